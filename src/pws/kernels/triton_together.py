"""All layers in one launch each way.

A program finds its filter's memory by address, in a record on the GPU.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from pws.kernels.backend import Job
from pws.kernels.triton_rows import backward_row, forward_row

WARPS: Final = 4
MOST_TABLES: Final = 64
INTERPRETED: Final = os.environ.get("TRITON_INTERPRET") == "1"
TYPES: Final = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _filter(records, constants):
    """Of this program's filter: its number; its layer; the addresses of its weight and of its alpha; its first entry in the
    layer; its fan-in; whether its memory is aligned; c and gamma."""
    row = tl.program_id(0)
    record = records + 4 * row
    packed = tl.load(record + 3)
    layer = packed >> 32
    count = (packed & 0x7FFFFFFF).to(tl.int32)
    aligned = (packed >> 31) & 1
    c = tl.load(constants + 2 * layer)
    gamma = tl.load(constants + 2 * layer + 1)
    return row, layer, tl.load(record), tl.load(record + 1), tl.load(record + 2), count, aligned, c, gamma


@triton.jit
def _forward_layers(kernels, records, constants, mean, rstd, kernel_type: tl.constexpr, weight_type: tl.constexpr, alpha_type: tl.constexpr):  # noqa: E501  # fmt: skip
    row, layer, at_weight, at_alpha, start, count, aligned, c, gamma = _filter(records, constants)
    weight = at_weight.to(tl.pointer_type(weight_type))
    kernel = tl.load(kernels + layer).to(tl.pointer_type(kernel_type)) + start
    scale = c * tl.load(at_alpha.to(tl.pointer_type(alpha_type))).to(tl.float32)
    if aligned:
        weight, kernel, count = tl.multiple_of(weight, 16), tl.multiple_of(kernel, 16), tl.multiple_of(count, 8)
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
def _backward_layers(grads, grad_weights, records, constants, mean, rstd, grad_alphas, grad_type: tl.constexpr, weight_type: tl.constexpr, alpha_type: tl.constexpr):  # noqa: E501  # fmt: skip
    row, layer, at_weight, at_alpha, start, count, aligned, c, _ = _filter(records, constants)
    at_grads = tl.load(grads + layer)
    if at_grads == 0:
        return
    grad = at_grads.to(tl.pointer_type(grad_type)) + start
    weight = at_weight.to(tl.pointer_type(weight_type))
    out = tl.load(grad_weights + layer).to(tl.pointer_type(weight_type)) + start
    scale = c * tl.load(at_alpha.to(tl.pointer_type(alpha_type))).to(tl.float32)
    m = tl.load(mean + row)
    r = tl.load(rstd + row)
    if aligned:
        grad, weight, out, count = tl.multiple_of(grad, 16), tl.multiple_of(weight, 16), tl.multiple_of(out, 16), tl.multiple_of(count, 8)  # noqa: E501  # fmt: skip
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
        weights, alphas = [job.weight for job in jobs], [job.alpha for job in jobs]
        self.constants = [job[2:] for job in jobs]
        self._device, self._dtypes = weights[0].device, (weights[0].dtype, alphas[0].dtype)
        self._types = {"weight_type": TYPES[weights[0].dtype], "alpha_type": TYPES[alphas[0].dtype]}
        self._addresses = [t.data_ptr() for t in (*weights, *alphas)]
        self._filters = [len(w) for w in weights]
        self._rows = sum(self._filters)
        self._layouts = [(w.shape, w.stride()) for w in weights]
        self._strides: list[tuple[int, ...]] = [w.stride() for w in weights]
        self._records = self._uploaded(torch.cat([_records(i, job) for i, job in enumerate(jobs)]))
        self._constants = self._uploaded(torch.tensor(self.constants, dtype=torch.float32, device="cpu"))
        self._tables: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    def forward(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """`kernel = c alpha h`, `h = (w - m) / sqrt(v + gamma)`."""
        with torch._C._AutoDispatchBelowAutograd(), torch.cuda.device_of(self._records):
            kernels = self._empty(dtype)
            mean = torch.empty(self._rows, dtype=torch.float32, device=self._device)
            rstd = torch.empty_like(mean)
            _forward_layers[(self._rows,)](
                *(self._table(kernels), self._records, self._constants, mean, rstd),
                **self._types,
                kernel_type=TYPES[dtype],
                num_warps=WARPS,
            )
        return kernels, [mean, rstd]

    def backward(
        self, grads: Sequence[Tensor | None], tensors: Sequence[Tensor], statistics: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """See `Plan`."""
        if [t.data_ptr() for t in tensors] != self._addresses:  # moved since the forward pass
            n = len(grads)
            jobs = [Job(w, a, *both) for w, a, both in zip(tensors[:n], tensors[n:], self.constants, strict=True)]
            return TritonPlan(jobs).backward(grads, tensors, statistics)
        of_weights, of_alphas = self.gradients(grads, statistics)
        there = [grad is not None for grad in grads]
        return _where(there, of_weights), _where(there, of_alphas.split_with_sizes(self._filters))

    def gradients(self, grads: Sequence[Tensor | None], statistics: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """`dw = c alpha / sqrt(v + gamma) (g - mean(g) - h mean(g h))`, and `dalpha = c sum(g h)` of all layers in one."""
        with torch._C._AutoDispatchBelowAutograd(), torch.cuda.device_of(self._records):
            grads = self._in_order(grads)
            of_weights = self._empty(self._dtypes[0])
            of_alphas = torch.empty(self._rows, dtype=torch.float32, device=self._device)
            _backward_layers[(self._rows,)](
                *(self._table(grads), self._table(of_weights), self._records, self._constants, *statistics, of_alphas),
                **self._types,
                grad_type=next(TYPES[grad.dtype] for grad in grads if grad is not None),
                num_warps=WARPS,
            )
            return of_weights, of_alphas.to(self._dtypes[1])

    def _empty(self, dtype: torch.dtype) -> list[Tensor]:
        """A tensor for each layer, laid out as its weight."""
        return [torch.empty_strided(*layout, dtype=dtype, device=self._device) for layout in self._layouts]

    def _in_order(self, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradients, with their entries in the order of the weights', aligned."""
        strides = [() if g is None else g.stride() for g in grads]
        if strides == self._strides and not any(g is not None and g.data_ptr() % 16 for g in grads):
            return grads
        found = [None if g is None else _like(g, *layout) for g, layout in zip(grads, self._layouts, strict=True)]
        if all(new is old for new, old in zip(found, grads, strict=True)):
            self._strides = strides  # strides of dimensions of one entry mean nothing
        return found

    def _table(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Where each layer's tensor lies; 0 where there is none. Addresses repeat from step to step, for the allocator hands
        out the same memory: what was uploaded serves again."""
        addresses = tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors])
        found = self._tables.get(addresses)
        if found is None:
            found = self._tables[addresses] = self._uploaded(torch.tensor(addresses, device="cpu"))
            if len(self._tables) > MOST_TABLES:
                self._tables.popitem(last=False)
        return found

    def _uploaded(self, table: Tensor) -> Tensor:
        return table.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else table


def _records(layer: int, job: Job) -> Tensor:
    """A row a filter, for `_filter`."""
    weight, alpha = job.weight, job.alpha
    count, o = weight[0].numel(), torch.arange(len(weight), device="cpu")
    aligned = weight.data_ptr() % 16 == 0 and count % 8 == 0
    packed = torch.full_like(o, (layer << 32) | (aligned << 31) | count)
    at_weight = weight.data_ptr() + o * count * weight.element_size()
    return torch.stack([at_weight, alpha.data_ptr() + o * alpha.element_size(), o * count, packed], dim=1)


def _like(grad: Tensor, shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
    pairs = zip(grad.stride(), strides, shape, strict=True)
    if grad.data_ptr() % 16 == 0 and all(n == 1 or mine == its for mine, its, n in pairs):
        return grad
    return torch.empty_strided(shape, strides, dtype=grad.dtype, device=grad.device).copy_(grad)


def _where(there: Sequence[bool], tensors: Sequence[Tensor]) -> list[Tensor | None]:
    return [tensor if mine else None for mine, tensor in zip(there, tensors, strict=True)]
