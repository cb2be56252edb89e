"""What stands around a call: transforms of torch.func, tracers and other dispatch modes, which have to see an operator; CUDA
graphs and streams."""

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


def captures() -> bool:
    """Whether launches go to a CUDA graph, which would read again, when it is replayed, what is uploaded now."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def stream() -> int | None:
    """Where launches and uploads go to; another stream would not wait for them."""
    return torch.cuda.current_stream().cuda_stream if torch.cuda.is_initialized() else None
