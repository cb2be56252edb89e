"""All layers in one launch each way.

The kernel finds its layer by the number of its filter, and the layer's memory by its address, in tables on the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from pws.kernels.backend import Job
from pws.kernels.triton_rows import backward_row, forward_row

ALIGNED: Final = 64
"""Entries to which each layer's part of a buffer is aligned: convolutions are slower on memory that is not."""
WARPS: Final = 4
MOST_TABLES: Final = 64
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
    alpha = tl.load(alphas + layer).to(tl.pointer_type(alpha_type))
    return c * tl.load(alpha + o).to(tl.float32)


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


class TritonPlan:
    """See `pws.kernels.backend.Plan`."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        weights, alphas = [job.weight for job in jobs], [job.alpha for job in jobs]
        self._device = weights[0].device
        self._addresses = [t.data_ptr() for t in (*weights, *alphas)]
        self._types = {"weight_type": TYPES[weights[0].dtype], "alpha_type": TYPES[alphas[0].dtype]}
        self._filters = [len(w) for w in weights]
        padded = [-(-w.numel() // ALIGNED) * ALIGNED for w in weights]
        starts = [0, *accumulate(padded)]
        self._entries, self._rows = starts.pop(), sum(self._filters)
        self._parts = [(w.shape, w.stride(), start) for w, start in zip(weights, starts, strict=True)]
        self._strides: list[tuple[int, ...]] = [w.stride() for w in weights]
        firsts = accumulate([0, *self._filters[:-1]])
        places = [(first, w[0].numel(), start) for first, w, start in zip(firsts, weights, starts, strict=True)]
        self._tables = (
            self._uploaded(torch.tensor(self._addresses[: len(jobs)])),
            self._uploaded(torch.tensor(self._addresses[len(jobs) :])),
            self._uploaded(torch.repeat_interleave(torch.tensor(self._filters)).to(torch.int32)),
            self._uploaded(torch.tensor(places)),
            self._uploaded(torch.tensor([job[2:] for job in jobs], dtype=torch.float32)),
        )
        self._grad_tables: dict[tuple[int, ...], Tensor] = {}

    def forward(self, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """`kernel = c alpha h`, `h = (w - m) / sqrt(v + gamma)`."""
        with torch._C._AutoDispatchBelowAutograd(), torch.cuda.device_of(self._tables[0]):
            kernels = torch.empty(self._entries, dtype=dtype, device=self._device)
            mean = torch.empty(self._rows, dtype=torch.float32, device=self._device)
            rstd = torch.empty_like(mean)
            _forward_layers[(self._rows,)](*self._tables, kernels, mean, rstd, **self._types, num_warps=WARPS)
            return [kernels.as_strided(*part) for part in self._parts], [mean, rstd]

    def backward(
        self, grads: Sequence[Tensor | None], saved: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """`dw = c alpha / sqrt(v + gamma) (g - mean(g) - h mean(g h))`, `dalpha = c sum(g h)`."""
        with torch._C._AutoDispatchBelowAutograd(), torch.cuda.device_of(self._tables[0]):
            grads = self._in_order(grads)
            grad_type = next(TYPES[g.dtype] for g in grads if g is not None)
            grad_weights = torch.empty(self._entries, dtype=self.jobs[0].weight.dtype, device=self._device)
            grad_alphas = torch.empty(self._rows, dtype=torch.float32, device=self._device)
            _backward_layers[(self._rows,)](
                *(self._grad_table(grads), *self._tables, *saved, grad_weights, grad_alphas),
                **self._types,
                grad_type=grad_type,
                num_warps=WARPS,
            )
            of_weights = [grad_weights.as_strided(*part) for part in self._parts]
            of_alphas = grad_alphas.to(self.jobs[0].alpha.dtype).split_with_sizes(self._filters)
        there = [g is not None for g in grads]
        return _where(there, of_weights), _where(there, of_alphas)

    def is_for(self, tensors: Sequence[Tensor]) -> bool:
        """See `Plan`."""
        return [t.data_ptr() for t in tensors] == self._addresses

    def _in_order(self, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradients, with their entries in the order of the weights'."""
        strides = [() if g is None else g.stride() for g in grads]
        if strides == self._strides:
            return grads
        found = [None if g is None else _like(g, job.weight) for g, job in zip(grads, self.jobs, strict=True)]
        if all(new is old for new, old in zip(found, grads, strict=True)):
            self._strides = strides  # strides of dimensions of one entry mean nothing
        return found

    def _grad_table(self, grads: Sequence[Tensor | None]) -> Tensor:
        """Where the gradients lie; 0 where there is none. Addresses repeat from step to step, for the allocator hands out the
        same memory: what was uploaded once serves again."""
        addresses = tuple([0 if g is None else g.data_ptr() for g in grads])
        table = self._grad_tables.get(addresses)
        if table is None:
            if len(self._grad_tables) == MOST_TABLES:
                self._grad_tables.clear()
            table = self._grad_tables[addresses] = self._uploaded(torch.tensor(addresses))
        return table

    def _uploaded(self, table: Tensor) -> Tensor:
        return table.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else table


def _like(grad: Tensor, weight: Tensor) -> Tensor:
    strides = zip(grad.stride(), weight.stride(), weight.shape, strict=True)
    if all(n == 1 or mine == its for mine, its, n in strides):
        return grad
    return torch.empty_strided(weight.shape, weight.stride(), dtype=grad.dtype, device=grad.device).copy_(grad)


def _where(there: Sequence[bool], tensors: Sequence[Tensor]) -> list[Tensor | None]:
    return [tensor if mine else None for mine, tensor in zip(there, tensors, strict=True)]
