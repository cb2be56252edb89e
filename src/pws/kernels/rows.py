"""A weight of any dense layout as rows, and back.

The statistics of a filter do not care about the order of its entries: a weight in channels_last is rows in the order of its
memory, and its kernel and gradient keep that order.
"""

from __future__ import annotations

import torch
from torch import Tensor


def order_of(weight: Tensor) -> list[int] | None:
    """The dimensions of `weight` in the order of its memory, filters first; None if that is their own order."""
    if weight.is_contiguous():
        return None
    return [0, *sorted(range(1, weight.dim()), key=weight.stride, reverse=True)]


def rows_of(tensor: Tensor, order: list[int] | None) -> Tensor:
    """`(O, ...)` to `(O, K)`; a copy only where the memory is not dense in that order."""
    ordered = tensor if order is None else tensor.permute(order)
    return ordered.reshape(len(ordered), -1)


def unrolled(rows_OK: Tensor, shape: torch.Size, order: list[int] | None) -> Tensor:
    """The inverse of `rows_of`."""
    if order is None:
        return rows_OK.view(shape)
    return rows_OK.view([shape[d] for d in order]).permute([order.index(d) for d in range(len(order))])


def is_dense(weight: Tensor) -> bool:
    """Whether the entries of each filter lie next to each other in memory, in whatever order."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim(), torch.contiguous_format)
    return weight.is_contiguous() or weight.is_contiguous(memory_format=last)
