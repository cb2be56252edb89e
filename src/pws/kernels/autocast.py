"""The dtype of a kernel."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

# Asked once: torch.compile of torch 2.11 can't trace the question, and would compile each layer's call on its own.
_DEVICES: Final = frozenset(
    device for device in ("cpu", "cuda", "mps", "xpu", "hpu", "xla", "mtia") if torch.amp.is_autocast_available(device)
)


def result_dtype(weight: Tensor) -> torch.dtype:
    """Autocast's dtype where that is enabled, else the weight's. Autocast leaves float64 alone, and so do we."""
    device = weight.device.type
    if weight.dtype == torch.float64 or device not in _DEVICES:
        return weight.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
