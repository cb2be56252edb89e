"""Who has to see an operator: transforms of torch.func, tracers and other dispatch modes, and subclasses of Tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def is_plain(tensor: Tensor | None) -> bool:
    """Whether `tensor` is one of torch's own classes, or None."""
    return tensor is None or type(tensor) in _PLAIN


def somebody_observes() -> bool:
    """Whether something between callers and backends wants to know what is done with any tensor."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
    )
