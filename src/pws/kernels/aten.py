"""The standardization in stock operators: every device and dtype, and the formula that the other backends are held to.

Shape letters: O filters (output channels), K entries of a filter (the fan-in n).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pws.kernels.backend import Backend


def forward(
    weight_OK: Tensor, alpha_O: Tensor | None, c: float, gamma: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernel = c alpha h`, `h = (w - m) / sqrt(v + gamma)`."""
    wide_OK = widen(weight_OK)
    # Layer norm over a row is h: one pass over the weight, where mean, deviation and quotient are four.
    h_OK, mean_O1, rstd_O1 = torch.native_layer_norm(wide_OK, wide_OK.shape[1:], None, None, gamma)
    scale: Tensor | float = c if alpha_O is None else c * alpha_O.to(wide_OK.dtype)[:, None]
    return (h_OK * scale).to(dtype), mean_O1.reshape(-1), rstd_O1.reshape(-1)


def composed(weight: Tensor, alpha_O: Tensor | None, c: float, gamma: float, dtype: torch.dtype) -> Tensor:
    """The kernel of a weight `(O, ...)`, for a compiler to fuse: in the weight's own shape, so that it can be written in the
    layout that the convolution asks for. Rows in between would be copied, each way."""
    wide = widen(weight)
    h = torch.nn.functional.layer_norm(wide, wide.shape[1:], None, None, gamma)
    scale = c if alpha_O is None else (c * alpha_O.to(wide.dtype)).view(-1, *[1] * (weight.dim() - 1))
    return (h * scale).to(dtype)


def backward(
    grad_OK: Tensor, weight_OK: Tensor, alpha_O: Tensor | None, mean_O: Tensor, rstd_O: Tensor, c: float
) -> tuple[Tensor, Tensor]:
    """`dw = c alpha / sqrt(v + gamma) (g - mean(g) - h mean(g h))`, `dalpha = c sum(g h)` (paper section 2)."""
    wide_OK, g_OK = widen(weight_OK), grad_OK.to(rstd_O.dtype)
    h_OK = (wide_OK - mean_O[:, None]) * rstd_O[:, None]
    along_O1 = (g_OK * h_OK).mean(1, keepdim=True)
    scale_O = c * rstd_O if alpha_O is None else c * rstd_O * alpha_O.to(rstd_O.dtype)
    grad_weight_OK = scale_O[:, None] * (g_OK - g_OK.mean(1, keepdim=True) - h_OK * along_O1)
    return grad_weight_OK.to(weight_OK.dtype), along_O1[:, 0] * (c * weight_OK.shape[1])


def statistics(weight_OK: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Mean and `1 / sqrt(v + gamma)` of each filter, differentiable, in two passes: a large mean costs no digits."""
    wide_OK = widen(weight_OK)
    mean_O1 = wide_OK.mean(1, keepdim=True)
    variance_O = (wide_OK - mean_O1).square().mean(1)
    return mean_O1[:, 0], (variance_O + gamma).rsqrt()


def widen(tensor: Tensor) -> Tensor:
    """In float32 at least: half-precision statistics would overflow."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


ATEN = Backend("aten", forward, backward, lambda _: None)
