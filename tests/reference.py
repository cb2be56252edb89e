"""Paper section 2 in plain torch operations and float64: what `pws` is compared with. Nothing here comes from `src`."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

RELU_GAIN: Final = math.sqrt(2 / (1 - 1 / math.pi))
"""Paper section 3. The page prints 1.7139 for it; the formula gives 1.71286."""


def fan_in(weight: Tensor) -> int:
    return math.prod(weight.shape[1:])


def per_filter(vector: Tensor, weight: Tensor) -> Tensor:
    """`(O,)` shaped to multiply a weight `(O, ...)`."""
    return vector.reshape(-1, *[1] * (weight.dim() - 1))


def normalized(weight: Tensor, gamma: float, relative: bool) -> tuple[Tensor, Tensor]:
    """`h` in the shape of the weight, and the root `sqrt(v + gamma)` `(O,)`."""
    rows = weight.double().flatten(1)
    n = fan_in(weight)
    mean = rows.sum(1) / n
    variance = ((rows - mean[:, None]) ** 2).sum(1) / n
    root = torch.sqrt(variance + (gamma * 2 / n if relative else gamma))
    return (weight.double() - per_filter(mean, weight)) / per_filter(root, weight), root


def kernel(
    weight: Tensor,
    alpha: Tensor | None = None,
    *,
    gain: float = RELU_GAIN,
    gamma: float = 1e-3,
    relative: bool = False,
) -> Tensor:
    """`c alpha_o (w_o - m_o) / sqrt(v_o + gamma)`, `c = gain / sqrt(n)`."""
    h, _ = normalized(weight, gamma, relative)
    scale = torch.ones(weight.shape[0], dtype=torch.float64) if alpha is None else alpha.double()
    return gain / math.sqrt(fan_in(weight)) * per_filter(scale, weight) * h


def gradients(
    weight: Tensor,
    alpha: Tensor | None,
    g: Tensor,
    *,
    gain: float = RELU_GAIN,
    gamma: float = 1e-3,
    relative: bool = False,
) -> tuple[Tensor, Tensor]:
    """The published `d w` and `d alpha` for the gradient `g` of the kernel, written out."""
    n, g = fan_in(weight), g.double()
    c = gain / math.sqrt(n)
    h, root = normalized(weight, gamma, relative)
    scale = torch.ones(weight.shape[0], dtype=torch.float64) if alpha is None else alpha.double()
    grad_alpha = c * (g * h).flatten(1).sum(1)
    mean_g, mean_gh = ((t.flatten(1).sum(1) / n) for t in (g, g * h))
    inner = g - per_filter(mean_g, weight) - h * per_filter(mean_gh, weight)
    return per_filter(c * scale / root, weight) * inner, grad_alpha


def transposed_kernel(weight: Tensor, alpha: Tensor, groups: int, **settings: float) -> Tensor:
    """The kernel of a transposed convolution, one output channel at a time.

    Output channel `g * b + j` of group `g` is made by `weight[g * a : (g + 1) * a, j]`, with `a` inputs and `b` outputs
    a group (`torch.nn.ConvTranspose2d`: the weight is `(in_channels, out_channels / groups, ...)`).
    """
    a, b = weight.shape[0] // groups, weight.shape[1]
    blocks = []
    for g in range(groups):
        columns = [
            kernel(weight[g * a : (g + 1) * a, j][None], alpha[g * b + j][None], **settings)[0] for j in range(b)
        ]
        blocks.append(torch.stack(columns, dim=1))
    return torch.cat(blocks)
