"""The standardization on CPU cores, a filter at a time while it is in the cache: one pass over memory each way.

Numba compiles the rows' loops; the rows are shared out among threads of our own, as many as torch has. Numba's own parallel
loops are not used: of its thread pools one ends the process when two threads call it at once, as autograd's do, another when
a data loader forks. A row is always summed by one thread, so results do not depend on the number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import torch
from numba import njit
from torch import Tensor

from pws.kernels.backend import Backend

GRAIN: Final = 32_768
"""Entries worth a thread of their own: handing them over costs as much as standardizing about so many."""
# Sums may be reordered, into vector lanes; NaN and infinity keep their meaning.
FAST: Final = {"reassoc", "contract", "arcp", "nsz"}


@njit(nogil=True, fastmath=FAST, cache=True)
def _forward_rows(
    first: int, last: int, weight_OK: Any, scale_O: Any, gamma: Any, kernel_OK: Any, mean_O: Any, rstd_O: Any
) -> None:
    entries = weight_OK.shape[1]
    count = np.float32(entries)
    for o in range(first, last):
        row, out = weight_OK[o], kernel_OK[o]
        total = np.float32(0)
        for k in range(entries):
            total += row[k]
        mean = total / count
        squares = np.float32(0)
        drift = np.float32(0)  # what rounding has left of the sum: a constant filter would not be 0 without it
        for k in range(entries):
            centred = row[k] - mean
            squares += centred * centred
            drift += centred
        drift /= count
        mean += drift
        rstd = np.float32(1) / np.sqrt(squares / count - drift * drift + gamma)
        scale = rstd * scale_O[o]
        for k in range(entries):
            out[k] = (row[k] - mean) * scale
        mean_O[o], rstd_O[o] = mean, rstd


@njit(nogil=True, fastmath=FAST, cache=True)
def _backward_rows(
    first: int,
    last: int,
    grad_OK: Any,
    weight_OK: Any,
    scale_O: Any,
    mean_O: Any,
    rstd_O: Any,
    grad_weight_OK: Any,
    along_O: Any,
) -> None:
    entries = weight_OK.shape[1]
    count = np.float32(entries)
    for o in range(first, last):
        g, row, out = grad_OK[o], weight_OK[o], grad_weight_OK[o]
        mean, rstd = mean_O[o], rstd_O[o]
        total = np.float32(0)
        product = np.float32(0)
        for k in range(entries):
            total += g[k]
            product += g[k] * (row[k] - mean)
        along = product * rstd
        scale, centre, slope = scale_O[o] * rstd, total / count, along / count * rstd
        for k in range(entries):
            out[k] = scale * (g[k] - centre - (row[k] - mean) * slope)
        along_O[o] = along


def forward(
    weight_OK: Tensor, alpha_O: Tensor | None, c: float, gamma: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernel = c alpha h`, `h = (w - m) / sqrt(v + gamma)`."""
    kernel_OK = torch.empty_like(weight_OK, memory_format=torch.contiguous_format)
    mean_O, rstd_O = (weight_OK.new_empty(weight_OK.shape[0]) for _ in range(2))
    arrays = [_array(t) for t in (weight_OK, _scale(weight_OK, alpha_O, c))]
    _share_out(_forward_rows, weight_OK, *arrays, np.float32(gamma), *map(_array, (kernel_OK, mean_O, rstd_O)))
    return kernel_OK.to(dtype), mean_O, rstd_O


def backward(
    grad_OK: Tensor, weight_OK: Tensor, alpha_O: Tensor | None, mean_O: Tensor, rstd_O: Tensor, c: float
) -> tuple[Tensor, Tensor]:
    """`dw = c alpha / sqrt(v + gamma) (g - mean(g) - h mean(g h))`, `dalpha = c sum(g h)` (paper section 2)."""
    grad_weight_OK = torch.empty_like(weight_OK, memory_format=torch.contiguous_format)
    along_O = torch.empty_like(mean_O)
    inputs = (grad_OK.float(), weight_OK, _scale(weight_OK, alpha_O, c), mean_O, rstd_O)
    _share_out(_backward_rows, weight_OK, *map(_array, (*inputs, grad_weight_OK, along_O)))
    return grad_weight_OK, along_O * c


def _scale(weight_OK: Tensor, alpha_O: Tensor | None, c: float) -> Tensor:
    return weight_OK.new_full(weight_OK.shape[:1], c) if alpha_O is None else c * alpha_O.float()


def _array(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().numpy()


def _share_out(rows: Callable[..., None], weight_OK: Tensor, *arrays: Any) -> None:
    filters = weight_OK.shape[0]
    parts = min(torch.get_num_threads(), 1 + weight_OK.numel() // GRAIN, filters)
    cuts = [filters * part // parts for part in range(parts + 1)]
    others = [_threads().submit(rows, cuts[i], cuts[i + 1], *arrays) for i in range(1, parts)]
    rows(cuts[0], cuts[1], *arrays)
    for other in others:
        other.result()


_pool: ThreadPoolExecutor | None = None


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count(), "pws-standardize")
    return _pool


def _forget() -> None:
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget)  # a forked process has the pool, but not its threads


def _refusal(weight_OK: Tensor) -> str | None:
    if weight_OK.device.type != "cpu" or weight_OK.dtype != torch.float32:
        return f"it serves float32 weights on the CPU; this one is {weight_OK.dtype} on {weight_OK.device}"
    return None


CPU = Backend("cpu", forward, backward, _refusal)
