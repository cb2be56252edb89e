"""All layers in one launch each way.

The kernel finds its layer by the number of its filter, and the layer's memory by its address, in tables on the GPU. A table is
uploaded once for the same contents: addresses repeat from step to step, since the allocator hands out the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from pws.kernels.backend import Job
from pws.kernels.triton_rows import backward_row, forward_row

ALIGNED: Final = 64
"""Entries to which each layer's part of a buffer is aligned: convolutions are slower on memory that is not."""
WARPS: Final = 4
TYPES: Final = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _place(layer_of_row, places):
    """Of this program's filter: its number among all, its layer, its number in it, the layer's fan-in, the filter's entry in a
    buffer of all layers."""
    row = tl.program_id(0).to(tl.int64)
    layer = tl.load(layer_of_row + row)
    o = row - tl.load(places + 3 * layer)
    count = tl.load(places + 3 * layer + 1).to(tl.int32)
    return row, layer, o, count, tl.load(places + 3 * layer + 2) + o * count


@triton.jit
def _scale(c, alphas, layer, o, alpha_type: tl.constexpr):
    address = tl.load(alphas + layer)
    alpha = 1.0
    if address != 0:
        alpha = tl.load(address.to(tl.pointer_type(alpha_type)) + o).to(tl.float32)
    return c * alpha


@triton.jit
def _forward_layers(weights, alphas, layer_of_row, places, constants, kernels, mean, rstd, weight_type: tl.constexpr, alpha_type: tl.constexpr):  # noqa: E501  # fmt: skip
    row, layer, o, count, start = _place(layer_of_row, places)
    weight = tl.load(weights + layer).to(tl.pointer_type(weight_type)) + o * count
    kernel = kernels + start
    gamma = tl.load(constants + 2 * layer + 1)
    scale = _scale(tl.load(constants + 2 * layer), alphas, layer, o, alpha_type)
    if count % 4 == 0:
        weight, kernel, count = tl.multiple_of(weight, 16), tl.multiple_of(kernel, 8), tl.multiple_of(count, 4)
        if count <= 256:
            m, r = forward_row(weight, kernel, scale, count, gamma, 256, True)
        elif count <= 1024:
            m, r = forward_row(weight, kernel, scale, count, gamma, 1024, True)
        else:
            m, r = forward_row(weight, kernel, scale, count, gamma, 2048, False)
    elif count <= 256:
        m, r = forward_row(weight, kernel, scale, count, gamma, 256, True)
    else:
        m, r = forward_row(weight, kernel, scale, count, gamma, 1024, False)
    tl.store(mean + row, m)
    tl.store(rstd + row, r)


@triton.jit
def _backward_layers(grads, weights, alphas, layer_of_row, places, constants, mean, rstd, grad_weights, grad_alphas, grad_type: tl.constexpr, weight_type: tl.constexpr, alpha_type: tl.constexpr):  # noqa: E501  # fmt: skip
    row, layer, o, count, start = _place(layer_of_row, places)
    address = tl.load(grads + layer)
    if address == 0:
        return
    grad = address.to(tl.pointer_type(grad_type)) + o * count
    weight = tl.load(weights + layer).to(tl.pointer_type(weight_type)) + o * count
    out = grad_weights + start
    c = tl.load(constants + 2 * layer)
    scale = _scale(c, alphas, layer, o, alpha_type)
    m = tl.load(mean + row)
    r = tl.load(rstd + row)
    if count % 4 == 0:
        grad, weight, out, count = tl.multiple_of(grad, 8), tl.multiple_of(weight, 16), tl.multiple_of(out, 16), tl.multiple_of(count, 4)  # noqa: E501  # fmt: skip
        if count <= 256:
            along = backward_row(grad, weight, out, scale, m, r, count, 256, True)
        elif count <= 1024:
            along = backward_row(grad, weight, out, scale, m, r, count, 1024, True)
        else:
            along = backward_row(grad, weight, out, scale, m, r, count, 2048, False)
    elif count <= 256:
        along = backward_row(grad, weight, out, scale, m, r, count, 256, True)
    else:
        along = backward_row(grad, weight, out, scale, m, r, count, 1024, False)
    tl.store(grad_alphas + row, c * along)


def forward_together(jobs: Sequence[Job], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """`kernel = c alpha h`, `h = (w - m) / sqrt(v + gamma)`, for all layers."""
    jobs = _dense(jobs)
    layout, device = _layout(jobs), jobs[0].weight.device
    kernels = torch.empty(layout.entries, dtype=dtype, device=device)
    mean, rstd = torch.empty(2, layout.rows, dtype=torch.float32, device=device)
    with torch.cuda.device_of(kernels):
        _forward_layers[(layout.rows,)](
            *(*_weights_and_alphas(jobs), *layout.tables(device, _stream(device)), kernels, mean, rstd),
            **_types(jobs),
            num_warps=WARPS,
        )
    return layout.parts(kernels, jobs), [mean, rstd]


def backward_together(
    grads: Sequence[Tensor | None], jobs: Sequence[Job], saved: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor | None] | None]:
    """`dw = c alpha / sqrt(v + gamma) (g - mean(g) - h mean(g h))`, `dalpha = c sum(g h)`, for all layers."""
    jobs = _dense(jobs)
    layout, device = _layout(jobs), jobs[0].weight.device
    grads = [None if g is None else _like(g, job.weight) for g, job in zip(grads, jobs, strict=True)]
    grad_type = next(TYPES[g.dtype] for g in grads if g is not None)
    grad_weights = torch.empty(layout.entries, dtype=jobs[0].weight.dtype, device=device)
    grad_alphas = torch.empty(layout.rows, dtype=torch.float32, device=device)
    with torch.cuda.device_of(grad_weights):
        addresses = _table(tuple(0 if g is None else g.data_ptr() for g in grads), device, _stream(device))
        _backward_layers[(layout.rows,)](
            *(addresses, *_weights_and_alphas(jobs), *layout.tables(device, _stream(device)), *saved),
            *(grad_weights, grad_alphas),
            **_types(jobs),
            grad_type=grad_type,
            num_warps=WARPS,
        )
    found = zip(grads, jobs, layout.parts(grad_weights, jobs), grad_alphas.split(layout.filters), strict=True)
    return [
        None if grad is None else (of_weight, None if job.alpha is None else of_alpha.to(job.alpha.dtype))
        for grad, job, of_weight, of_alpha in found
    ]


def _weights_and_alphas(jobs: Sequence[Job]) -> tuple[Tensor, Tensor]:
    device = jobs[0].weight.device
    alphas = tuple(0 if job.alpha is None else job.alpha.data_ptr() for job in jobs)
    stream = _stream(device)
    return _table(tuple(job.weight.data_ptr() for job in jobs), device, stream), _table(alphas, device, stream)


def _types(jobs: Sequence[Job]) -> dict[str, Any]:
    alpha = next((job.alpha.dtype for job in jobs if job.alpha is not None), torch.float32)
    return {"weight_type": TYPES[jobs[0].weight.dtype], "alpha_type": TYPES[alpha]}


class _Layout:
    """Where the filters of layers of given sizes lie in a buffer of all layers."""

    def __init__(self, sizes: Sequence[tuple[int, int]], constants: Sequence[tuple[float, float]]) -> None:
        self.filters = [filters for filters, _ in sizes]
        self.rows = sum(self.filters)
        padded = [-(-entries // ALIGNED) * ALIGNED for _, entries in sizes]
        self.starts = [0, *accumulate(padded)][:-1]
        self.entries = sum(padded)
        self._counts = [entries // filters for filters, entries in sizes]
        self._constants = constants

    @lru_cache(maxsize=8)  # noqa: B019  # layouts live in a cache themselves
    def tables(self, device: torch.device, stream: int) -> tuple[Tensor, Tensor, Tensor]:
        """The layer of each filter; first filter, fan-in and start of each layer; its c and gamma."""
        firsts = [0, *accumulate(self.filters)][:-1]
        layer_of_row = torch.repeat_interleave(torch.tensor(self.filters)).to(torch.int32)
        places = torch.tensor(list(zip(firsts, self._counts, self.starts, strict=True)))
        constants = torch.tensor(self._constants, dtype=torch.float32)
        return _uploaded(layer_of_row, device), _uploaded(places, device), _uploaded(constants, device)

    def parts(self, buffer: Tensor, jobs: Sequence[Job]) -> list[Tensor]:
        """Each layer's part of a buffer, laid out as its weight."""
        pairs = zip(jobs, self.starts, strict=True)
        return [buffer.as_strided(job.weight.shape, job.weight.stride(), start) for job, start in pairs]


def _layout(jobs: Sequence[Job]) -> _Layout:
    return _layout_of(tuple((len(job.weight), job.weight.numel()) for job in jobs), tuple(job[2:] for job in jobs))


_layout_of = lru_cache(maxsize=64)(_Layout)


@lru_cache(maxsize=256)
def _table(addresses: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """Addresses on the device. One table a stream: another one would not wait for the upload."""
    return _uploaded(torch.tensor(addresses), device)


def _uploaded(table: Tensor, device: torch.device) -> Tensor:
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _dense(jobs: Sequence[Job]) -> list[Job]:
    """With each filter's entries next to each other in memory, in whatever order."""
    return [
        Job(_dense_weight(job.weight), None if job.alpha is None else job.alpha.contiguous(), job.c, job.gamma)
        for job in jobs
    ]


def _dense_weight(weight: Tensor) -> Tensor:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim(), torch.contiguous_format)
    return weight if weight.is_contiguous(memory_format=last) else weight.contiguous()


def _like(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient, with its entries in the order of the weight's."""
    strides = zip(grad.stride(), weight.stride(), weight.shape, strict=True)
    if all(n == 1 or mine == its for mine, its, n in strides):
        return grad
    return torch.empty_strided(weight.shape, weight.stride(), dtype=grad.dtype, device=grad.device).copy_(grad)
