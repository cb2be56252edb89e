"""The standardization on GPUs: a program a filter, one launch each way, statistics in float32.

The kernel is written in the dtype that convolves (autocast's), so that no separate cast runs. Filters of up to `LARGEST_BLOCK`
entries are read once and kept in registers; larger ones are read again from the cache.
"""

from __future__ import annotations

import os
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from pws.kernels.backend import Backend

LARGEST_BLOCK: Final = 8192
DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _forward_rows(weight, alpha, kernel, mean, rstd, count, c, gamma, scaled: tl.constexpr, block: tl.constexpr, whole: tl.constexpr):  # noqa: E501  # fmt: skip
    o = tl.program_id(0).to(tl.int64)
    weight += o * count
    kernel += o * count
    k = tl.arange(0, block)
    scale = c
    if scaled:
        scale = c * tl.load(alpha + o).to(tl.float32)
    if whole:
        inside = k < count
        row = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
        m = tl.sum(row) / count
        centred = tl.where(inside, row - m, 0.0)
        r = 1.0 / tl.sqrt(tl.sum(centred * centred) / count + gamma)
        tl.store(kernel + k, (centred * (r * scale)).to(kernel.dtype.element_ty), mask=inside)
    else:
        total = tl.zeros([block], tl.float32)
        for start in range(0, count, block):
            total += tl.load(weight + start + k, mask=start + k < count, other=0.0).to(tl.float32)
        m = tl.sum(total) / count
        squares = tl.zeros([block], tl.float32)
        for start in range(0, count, block):
            row = tl.load(weight + start + k, mask=start + k < count, other=0.0).to(tl.float32)
            centred = tl.where(start + k < count, row - m, 0.0)
            squares += centred * centred
        r = 1.0 / tl.sqrt(tl.sum(squares) / count + gamma)
        for start in range(0, count, block):
            row = tl.load(weight + start + k, mask=start + k < count, other=0.0).to(tl.float32)
            out = ((row - m) * (r * scale)).to(kernel.dtype.element_ty)
            tl.store(kernel + start + k, out, mask=start + k < count)
    tl.store(mean + o, m)
    tl.store(rstd + o, r)


@triton.jit
def _backward_rows(grad, weight, alpha, mean, rstd, grad_weight, grad_alpha, count, c, scaled: tl.constexpr, block: tl.constexpr, whole: tl.constexpr):  # noqa: E501  # fmt: skip
    o = tl.program_id(0).to(tl.int64)
    grad += o * count
    weight += o * count
    grad_weight += o * count
    k = tl.arange(0, block)
    m = tl.load(mean + o)
    r = tl.load(rstd + o)
    scale = c * r
    if scaled:
        scale = scale * tl.load(alpha + o).to(tl.float32)
    if whole:
        inside = k < count
        g = tl.load(grad + k, mask=inside, other=0.0).to(tl.float32)
        row = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
        h = tl.where(inside, (row - m) * r, 0.0)
        along = tl.sum(g * h)
        out = scale * (g - tl.sum(g) / count - h * (along / count))
        tl.store(grad_weight + k, out.to(grad_weight.dtype.element_ty), mask=inside)
    else:
        totals = tl.zeros([block], tl.float32)
        products = tl.zeros([block], tl.float32)
        for start in range(0, count, block):
            inside = start + k < count
            g = tl.load(grad + start + k, mask=inside, other=0.0).to(tl.float32)
            row = tl.load(weight + start + k, mask=inside, other=0.0).to(tl.float32)
            totals += g
            products += g * (row - m) * r
        along = tl.sum(products)
        centre = tl.sum(totals) / count
        for start in range(0, count, block):
            inside = start + k < count
            g = tl.load(grad + start + k, mask=inside, other=0.0).to(tl.float32)
            row = tl.load(weight + start + k, mask=inside, other=0.0).to(tl.float32)
            out = scale * (g - centre - (row - m) * r * (along / count))
            tl.store(grad_weight + start + k, out.to(grad_weight.dtype.element_ty), mask=inside)
    tl.store(grad_alpha + o, c * along)


def forward(
    weight_OK: Tensor, alpha_O: Tensor | None, c: float, gamma: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernel = c alpha h`, `h = (w - m) / sqrt(v + gamma)`."""
    weight_OK, alpha_O = weight_OK.contiguous(), _contiguous(alpha_O)
    kernel_OK = torch.empty_like(weight_OK, dtype=dtype)
    mean_O, rstd_O = (weight_OK.new_empty(weight_OK.shape[0], dtype=torch.float32) for _ in range(2))
    _programs(_forward_rows, weight_OK)(
        weight_OK, alpha_O, kernel_OK, mean_O, rstd_O, weight_OK.shape[1], c, gamma, **_shape(weight_OK, alpha_O)
    )
    return kernel_OK, mean_O, rstd_O


def backward(
    grad_OK: Tensor, weight_OK: Tensor, alpha_O: Tensor | None, mean_O: Tensor, rstd_O: Tensor, c: float
) -> tuple[Tensor, Tensor]:
    """`dw = c alpha / sqrt(v + gamma) (g - mean(g) - h mean(g h))`, `dalpha = c sum(g h)` (paper section 2)."""
    grad_OK, weight_OK, alpha_O = grad_OK.contiguous(), weight_OK.contiguous(), _contiguous(alpha_O)
    grad_weight_OK, grad_alpha_O = torch.empty_like(weight_OK), torch.empty_like(mean_O)
    _programs(_backward_rows, weight_OK)(
        *(grad_OK, weight_OK, alpha_O, mean_O, rstd_O, grad_weight_OK, grad_alpha_O, weight_OK.shape[1], c),
        **_shape(weight_OK, alpha_O),
    )
    return grad_weight_OK, grad_alpha_O


def _contiguous(alpha_O: Tensor | None) -> Tensor | None:
    return None if alpha_O is None else alpha_O.contiguous()


def _programs(rows: Any, weight_OK: Tensor) -> Any:
    return rows[(weight_OK.shape[0],)]


def _shape(weight_OK: Tensor, alpha_O: Tensor | None) -> dict[str, Any]:
    count = weight_OK.shape[1]
    block = min(LARGEST_BLOCK, triton.next_power_of_2(count))
    warps = max(1, min(8, block // 256))
    return {"scaled": alpha_O is not None, "block": block, "whole": count <= block, "num_warps": warps}


def _refusal(weight_OK: Tensor) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if weight_OK.dtype not in DTYPES or not (interpreted or weight_OK.is_cuda):
        return (
            "it serves float32, bfloat16 and float16 weights on GPUs; this one is "
            f"{weight_OK.dtype} on {weight_OK.device}"
        )
    return None


TRITON = Backend("triton", forward, backward, _refusal)
