"""The kernel of a layer that computes it, with a graph from the parameters alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pws._batch import REJECTIONS
from pws._preserve import preserved
from pws.diagnosis.recording.weighted_operation import Call, Operations


class _Reached(BaseException):
    """Carries a kernel out of a forward pass that need not go on."""

    def __init__(self, kernel: Tensor) -> None:
        self.kernel = kernel


def recomputed_kernel(module: nn.Module, args: Any, kwargs: Any, ordinal: int) -> Tensor | None:
    """The kernel of the operation that `module` calls as its `ordinal`-th, with a graph from the parameters alone.

    The module runs up to there once more, on detached inputs, and is left as it was. None if it does not get there.
    """
    inner = [child for child in module.modules() if child is not module]
    depth, seen = [0], [0]

    def enter(*_: object) -> None:
        depth[0] += 1

    def leave(*_: object) -> None:
        depth[0] -= 1

    def operation(call: Call) -> Tensor:
        if depth[0] == 0:
            seen[0] += 1
            if seen[0] > ordinal:
                raise _Reached(call.kernel)
        return call.run()

    handles = [child.register_forward_pre_hook(enter) for child in inner]
    handles += [child.register_forward_hook(leave, always_call=True) for child in inner]
    try:
        with preserved(module), torch.enable_grad(), torch.compiler.set_stance("force_eager"), Operations(operation):
            module.forward(*_detached(args), **_detached(kwargs))
    except _Reached as reached:
        return reached.kernel
    except REJECTIONS:
        return None
    finally:
        for handle in handles:
            handle.remove()
    return None


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    return type(value)(_detached(item) for item in value) if type(value) in (tuple, list) else value
