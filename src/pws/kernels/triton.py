"""The standardization on GPUs: a program a filter, one launch each way, for a layer or for all of them.

The kernel is written in the dtype that convolves (autocast's), so that no separate cast runs.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from pws.kernels.backend import Backend
from pws.kernels.triton_rows import backward_row, forward_row
from pws.kernels.triton_together import INTERPRETED, TYPES, TritonPlan

LARGEST_BLOCK: Final = 8192


@triton.jit
def _forward_rows(weight, alpha, kernel, mean, rstd, count, c, gamma, scaled: tl.constexpr, block: tl.constexpr, whole: tl.constexpr):  # noqa: E501  # fmt: skip
    o = tl.program_id(0).to(tl.int64)
    scale = c
    if scaled:
        scale = c * tl.load(alpha + o).to(tl.float32)
    m, r = forward_row(weight + o * count, kernel + o * count, scale, count, gamma, block, whole)
    tl.store(mean + o, m)
    tl.store(rstd + o, r)


@triton.jit
def _backward_rows(grad, weight, alpha, mean, rstd, grad_weight, grad_alpha, count, c, scaled: tl.constexpr, block: tl.constexpr, whole: tl.constexpr):  # noqa: E501  # fmt: skip
    o = tl.program_id(0).to(tl.int64)
    scale = c
    if scaled:
        scale = c * tl.load(alpha + o).to(tl.float32)
    m = tl.load(mean + o)
    r = tl.load(rstd + o)
    along = backward_row(
        grad + o * count, weight + o * count, grad_weight + o * count, scale, m, r, count, block, whole
    )
    tl.store(grad_alpha + o, c * along)


def forward(
    weight_OK: Tensor, alpha_O: Tensor | None, c: float, gamma: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernel = c alpha h`, `h = (w - m) / sqrt(v + gamma)`."""
    weight_OK, alpha_O = weight_OK.contiguous(), _contiguous(alpha_O)
    kernel_OK = torch.empty_like(weight_OK, dtype=dtype)
    mean_O, rstd_O = (weight_OK.new_empty(weight_OK.shape[0], dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(weight_OK):
        _forward_rows[(weight_OK.shape[0],)](
            *(weight_OK, alpha_O, kernel_OK, mean_O, rstd_O, weight_OK.shape[1], c, gamma), **_shape(weight_OK, alpha_O)
        )
    return kernel_OK, mean_O, rstd_O


def backward(
    grad_OK: Tensor, weight_OK: Tensor, alpha_O: Tensor | None, mean_O: Tensor, rstd_O: Tensor, c: float
) -> tuple[Tensor, Tensor]:
    """`dw = c alpha / sqrt(v + gamma) (g - mean(g) - h mean(g h))`, `dalpha = c sum(g h)` (paper section 2)."""
    grad_OK, weight_OK, alpha_O = grad_OK.contiguous(), weight_OK.contiguous(), _contiguous(alpha_O)
    grad_weight_OK, grad_alpha_O = torch.empty_like(weight_OK), torch.empty_like(mean_O)
    with torch.cuda.device_of(weight_OK):
        _backward_rows[(weight_OK.shape[0],)](
            *(grad_OK, weight_OK, alpha_O, mean_O, rstd_O, grad_weight_OK, grad_alpha_O, weight_OK.shape[1], c),
            **_shape(weight_OK, alpha_O),
        )
    return grad_weight_OK, grad_alpha_O


def _contiguous(alpha_O: Tensor | None) -> Tensor | None:
    return None if alpha_O is None else alpha_O.contiguous()


def _shape(weight_OK: Tensor, alpha_O: Tensor | None) -> dict[str, Any]:
    count = weight_OK.shape[1]
    block = min(LARGEST_BLOCK, triton.next_power_of_2(count))
    warps = max(1, min(8, block // 256))
    return {"scaled": alpha_O is not None, "block": block, "whole": count <= block, "num_warps": warps}


def _refusal(weight_OK: Tensor) -> str | None:
    if weight_OK.dtype not in TYPES or not (INTERPRETED or weight_OK.is_cuda):
        return (
            "it serves float32, bfloat16 and float16 weights on GPUs; this one is "
            f"{weight_OK.dtype} on {weight_OK.device}"
        )
    return None


TRITON = Backend("triton", forward, backward, _refusal, plan=TritonPlan)
