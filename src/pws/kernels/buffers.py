"""Memory on the CPU that is used again: the page faults of a fresh buffer cost more than the pass that fills it.

Kernels and gradients have the same sizes in every step, so what one step lets go of serves the next. What is kept is as much
as was in use at once, at most the kernels and gradients of the largest model; `empty_cache` gives it back.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

SMALLEST: Final = 32_768
"""Entries; smaller buffers come from malloc's lists, without page faults."""

# Taking from a list and putting back is atomic, and no order matters: that is all that threads need.
_idle: defaultdict[tuple[int, ...], list[Any]] = defaultdict(list)


class _Lease(np.ndarray):
    """A view of a buffer that puts the buffer back when it dies: torch holds it for as long as a tensor uses the memory."""

    def __del__(self, idle: defaultdict[tuple[int, ...], list[Any]] = _idle) -> None:
        idle[self.shape].append(self.base)


def empty(shape: torch.Size) -> Tensor:
    """An uninitialized contiguous float32 tensor."""
    if shape.numel() < SMALLEST:
        return torch.empty(shape, dtype=torch.float32, device="cpu")
    try:
        buffer = _idle[shape].pop()
    except IndexError:
        buffer = torch.empty(
            shape, dtype=torch.float32, device="cpu"
        ).numpy()  # torch's memory is aligned to cache lines, numpy's is not
    return torch.from_numpy(buffer.view(_Lease))


def empty_cache() -> None:
    """Let go of what no tensor uses."""
    _idle.clear()
