"""The standardization on CPU cores: numba's machine code on torch's threads."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from pws.kernels import threads
from pws.kernels.backend import Backend
from pws.kernels.buffers import empty
from pws.kernels.machine import GRAIN, Job, backward_part, forward_part


def forward(
    weight_OK: Tensor, alpha_O: Tensor | None, c: float, gamma: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernel = c alpha h`, `h = (w - m) / sqrt(v + gamma)`."""
    weight_OK, alpha_O = _dense(weight_OK), None if alpha_O is None else _dense(alpha_O)
    filters, entries = weight_OK.shape
    kernel_OK, mean_O, rstd_O = (
        empty(weight_OK.shape),
        torch.empty(filters, dtype=torch.float32, device="cpu"),
        torch.empty(filters, dtype=torch.float32, device="cpu"),
    )
    tensors = (weight_OK, alpha_O, mean_O, rstd_O, kernel_OK)
    _run(forward_part, Job(0, filters, entries, c, gamma, *map(_address, tensors)))
    return kernel_OK if dtype == torch.float32 else kernel_OK.to(dtype), mean_O, rstd_O


def backward(
    grad_OK: Tensor, weight_OK: Tensor, alpha_O: Tensor | None, mean_O: Tensor, rstd_O: Tensor, c: float
) -> tuple[Tensor, Tensor]:
    """`dw = c alpha / sqrt(v + gamma) (g - mean(g) - h mean(g h))`, `dalpha = c sum(g h)` (paper section 2)."""
    return _backward(empty(weight_OK.shape), _dense(grad_OK), weight_OK, alpha_O, mean_O, rstd_O, c)


def overwriting(
    grad_OK: Tensor, weight_OK: Tensor, alpha_O: Tensor | None, mean_O: Tensor, rstd_O: Tensor, c: float
) -> tuple[Tensor, Tensor]:
    """`backward` in the memory of `grad_OK`, which the convolution has just left in the cache."""
    grad_OK = _dense(grad_OK)
    return _backward(grad_OK, grad_OK, weight_OK, alpha_O, mean_O, rstd_O, c)


def _backward(
    grad_weight_OK: Tensor,
    grad_OK: Tensor,
    weight_OK: Tensor,
    alpha_O: Tensor | None,
    mean_O: Tensor,
    rstd_O: Tensor,
    c: float,
) -> tuple[Tensor, Tensor]:
    weight_OK, mean_O, rstd_O = map(_dense, (weight_OK, mean_O, rstd_O))
    alpha_O = None if alpha_O is None else _dense(alpha_O)
    filters, entries = weight_OK.shape
    grad_alpha_O = torch.empty(filters, dtype=torch.float32, device="cpu")
    tensors = (weight_OK, alpha_O, mean_O, rstd_O, grad_weight_OK, grad_OK, grad_alpha_O)
    _run(backward_part, Job(0, filters, entries, c, 0.0, *map(_address, tensors)))
    return grad_weight_OK, grad_alpha_O


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float32 and tensor.is_contiguous() else tensor.float().contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _run(part: Any, job: Job) -> None:
    portions = -(-job.filters * job.entries // GRAIN)
    threads.run(part.address, ctypes.addressof(job), min(torch.get_num_threads(), portions))


def _refusal(weight_OK: Tensor) -> str | None:
    if weight_OK.device.type != "cpu" or weight_OK.dtype != torch.float32:
        return f"it serves float32 weights on the CPU; this one is {weight_OK.dtype} on {weight_OK.device}"
    return None


CPU = Backend("cpu", forward, backward, _refusal, overwriting)
