"""What a model does with one example, by running it: what each layer and norm was given, and where tensors were added.

Nothing is read from names or from the order of `named_modules`: a tensor is followed from the layer that made it through every
function of torch until a layer or norm takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer

from pws._batch import REJECTIONS, Batch, check_finite, tensors_in
from pws._errors import PwsError, one_line
from pws.surgery.copying import copy_of
from pws.surgery.follower import Follower
from pws.surgery.running import branches_run, evaluated, random_kept
from pws.surgery.value import INPUT, Trace, Value


def trace(model: nn.Module, batch: Batch, is_norm: Callable[[nn.Module], bool]) -> Trace:
    """Run a copy of `model` on a batch in train mode, where all its branches run, its norms in eval mode, where any batch
    size does; then, for blocks that training skips at random, in eval mode. The model itself and all random numbers are left
    alone.

    Raises:
        PwsError: the model can't be run on the example.
    """
    # Buffers of lazy modules have no copy of their own.
    lazy = [buffer for buffer in model.buffers() if isinstance(buffer, UninitializedBuffer)]
    memo = {id(b): UninitializedBuffer(device=b.device, dtype=b.dtype) for b in lazy}  # type: ignore[call-arg]
    copy = copy_of(model, memo)
    run = Trace(copy)
    check_finite(batch.inputs, "input")
    with random_kept(copy):
        _follow(run, batch, is_norm, branches_run(copy))
        ran = {use.name for use in run.uses}
        if any(is_norm(module) and name not in ran for name, module in copy.named_modules()):
            _follow(run, batch, is_norm, evaluated(copy), required=False)
    return run


def _follow(
    run: Trace,
    batch: Batch,
    is_norm: Callable[[nn.Module], bool],
    mode: AbstractContextManager[None],
    *,
    required: bool = True,
) -> None:
    follower = Follower(run, is_norm)
    # With gradients, because forward functions may put hooks on tensors or differentiate.
    with mode, torch.enable_grad(), follower.hooks(), follower:
        for tensor in tensors_in(batch.inputs):
            follower.put(tensor, Value(frozenset({INPUT})))
        try:
            outputs = batch.outputs(run.model)
        except REJECTIONS as error:
            if not required:
                return
            raise rejected(run.model, error) from error
    follower.end(outputs)


def rejected(model: nn.Module, error: Exception) -> PwsError:
    """The error about an example that a model can't be run on."""
    return PwsError(
        f"{type(model).__name__} can't be run on the example: {type(error).__name__}: {one_line(error)}. Give what "
        "its forward takes: a tensor, or a tuple of all its arguments, of a size and device that the model takes."
    )
