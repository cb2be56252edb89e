"""Who has to see an operator: transforms of torch.func, tracers and other dispatch modes, and subclasses of Tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def is_observed(tensor: Tensor) -> bool:
    """Whether something between the caller and the backend wants to know what is done with `tensor`."""
    return (
        type(tensor) not in _PLAIN
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
    )
