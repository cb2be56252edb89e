"""All kernels of a model in one go before each forward pass: `standardize_together`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from pws.errors import PwsError
from pws.kernels.autocast import result_dtype
from pws.kernels.backend import Job, Plan
from pws.kernels.observed import is_plain, somebody_observes
from pws.kernels.registry import chosen, traced_operators
from pws.kernels.rows import is_dense
from pws.kernels.together import plan_for, prepare
from pws.layers import StandardizedLayer
from pws.standardize import constants

LARGEST_ON_CPU: Final = 524_288
"""Entries of a weight."""


class Together:
    """What `standardize_together` returns; `remove` undoes it."""

    def __init__(self, model: nn.Module, hooks: Hooks) -> None:
        self._handles: Final = (
            model.register_forward_pre_hook(hooks.before),
            model.register_forward_hook(hooks.after, always_call=True),
        )

    def remove(self) -> None:
        """Let each layer compute its own kernel again."""
        for handle in self._handles:
            handle.remove()


class Hooks:
    """Around the forward pass of a model."""

    def __init__(self, layers: list[StandardizedLayer]) -> None:
        self.layers = layers
        for layer in layers:
            layer.__dict__["prepared"] = (
                None  # of its own, from the start: a compiled program checks that it still is as it was
            )
        self._planned: tuple[list[Any], list[_Group]] = ([], [])
        """What the plans were made from, and the plans."""
        self._traced = traced_operators()

    def before(self, *_: Any) -> None:
        """Compute the kernels."""
        if torch.compiler.is_compiling():
            self._trace()
        elif not (_captures() or somebody_observes()):  # a graph's launches cost no Python
            self._compute()

    def _compute(self) -> None:
        pairs = self._pairs()
        if not all(map(_is_usual, chain.from_iterable(pairs))):
            return
        now = [chosen(), _stream(), *map(_place, pairs), *((x.gain, x.gamma, x.relative_gamma) for x in self.layers)]
        planned = self._planned
        if planned[0] != now:
            planned = self._planned = now, self._plan()
        for group in planned[1]:
            group.prepare(pairs, self.layers)

    def after(self, *_: Any) -> None:
        """Let go of them."""
        for layer in self.layers:
            if torch.compiler.is_compiling():
                layer.prepared = None
            else:
                layer.__dict__["prepared"] = None  # a module's own __setattr__ takes twenty times as long

    def _trace(self) -> None:
        """Have a compiled program compute the kernels in one launch, where its own would be one a layer. On a CPU it needs no
        launches, and fuses the formula itself."""
        pairs = self._pairs()
        if self._traced is None or not self._traced.serves(pairs):
            return
        settings = [
            constants(w, x.gain, x.gamma, x.relative_gamma) for (w, _), x in zip(pairs, self.layers, strict=True)
        ]
        c, gamma = [c for c, _ in settings], [gamma for _, gamma in settings]
        weights, alphas = [w for w, _ in pairs], [a for _, a in pairs]
        kernels = self._traced.Traced.apply(c, gamma, result_dtype(weights[0]), *weights, *alphas)
        for layer, kernel in zip(self.layers, kernels, strict=True):
            layer.prepared = kernel

    def _pairs(self) -> list[tuple[Any, Any]]:
        """The weights and alphas of now; None for a weight that is no parameter any more, but pruned or parametrized."""
        return [(layer._parameters.get("weight"), layer._parameters.get("alpha")) for layer in self.layers]

    def _plan(self) -> list[_Group]:
        together = defaultdict(list)
        for i, layer in enumerate(self.layers):
            weight, alpha = layer.filters().detach(), layer.alpha.detach()
            if _gains(weight) and is_dense(weight) and alpha.is_contiguous():
                job = Job(weight, alpha, *constants(weight, layer.gain, layer.gamma, layer.relative_gamma))
                together[weight.device, weight.dtype, alpha.dtype].append((i, job))
        return [_Group([i for i, _ in group], plan_for([job for _, job in group])) for group in together.values()]

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers}  # plans are of one place in memory, operators of one machine

    def __setstate__(self, state: dict[str, Any]) -> None:
        Hooks.__init__(self, **state)


class _Group(NamedTuple):
    """Layers of one device and the same dtypes."""

    numbers: list[int]
    plan: Plan

    def prepare(self, pairs: Sequence[tuple[Any, Any]], layers: Sequence[StandardizedLayer]) -> None:
        weights, alphas = zip(*(pairs[i] for i in self.numbers), strict=True)
        for i, prepared in zip(self.numbers, prepare(self.plan, weights, alphas), strict=True):
            layers[i].__dict__["prepared"] = prepared


def _place(pair: tuple[Any, Any]) -> tuple[Any, ...]:
    """Where weight and alpha lie, and how."""
    weight, alpha = pair
    return weight.data_ptr(), weight.dtype, weight.shape, weight.stride(), alpha.data_ptr(), alpha.dtype, alpha.stride()


def _gains(weight: Tensor) -> bool:
    """On a CPU what one pass over a large kernel costs is more than Python, and it is best read while it is in the cache."""
    return weight.device.type != "cpu" or weight.numel() <= LARGEST_ON_CPU


def _is_usual(tensor: Any) -> bool:
    return tensor is not None and is_plain(tensor) and not tensor.is_inference()


def _captures() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _stream() -> int | None:
    """The tables of a plan are uploaded in one stream; another would not wait for them."""
    return torch.cuda.current_stream().cuda_stream if torch.cuda.is_initialized() else None


def standardize_together(model: nn.Module) -> Together:
    """Compute the kernels of all pws layers of `model` in one go at the start of each of its forward passes.

    A layer's standardization takes a GPU a few microseconds, and Python and a launch take many times that. Together it is one
    launch each way for the model, and the numbers are the same. Worth it wherever Python is what a step waits for: small
    batches and small layers. Under `torch.compile`, in CUDA graphs, under `torch.func` and in checkpointed regions each layer
    computes its own kernel as ever.

    What it costs: the gradients of all weights come together, at the end of the backward pass. Where processes exchange
    gradients while the backward pass runs (DistributedDataParallel), leave it out.

    Args:
        model: with the layers that it will have: those put in later compute their own kernels.

    Returns:
        A handle, whose `remove()` undoes it. Copies of `model` do the same as `model`; a folded one has nothing of it.

    Raises:
        PwsError: `model` has no pws layers.

    Examples:
        >>> import pws
        >>> model = nn.Sequential(pws.Conv2d(3, 8, 3), nn.ReLU(), pws.Conv2d(8, 8, 3))
        >>> handle = standardize_together(model)
    """
    layers = [layer for layer in model.modules() if isinstance(layer, StandardizedLayer)]
    if not layers:
        raise PwsError(
            f"standardize_together is for models with pws layers; {type(model).__name__} has none. pws.convert makes them of "
            "a model's own."
        )
    # A transposed convolution's filters are a new tensor each time, which nobody asks for again.
    return Together(model, Hooks([layer for layer in layers if layer.filters() is layer._parameters.get("weight")]))


def remove_hooks(model: nn.Module) -> None:
    """Take what `standardize_together` added off `model` and its modules."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), Hooks):
                    del hooks[number]
                    module._forward_hooks_always_called.pop(number, None)
