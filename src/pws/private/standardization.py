"""The standardization of a layer's weight as its samplers need it.

Shape letters: O filters, K entries of a filter (the fan-in n).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pws._layers import StandardizedLayer
from pws._standardize import LARGE, constants
from pws.private.kernel_gradient import rows


@dataclass(frozen=True)
class Standardization:
    """`h = (w - m) r` with `r = 1 / sqrt(v + gamma)`, and `c = gain / sqrt(n)`; the kernel is `c alpha h`.

    With the kernel's gradient `G` of one sample, that of alpha and of the weight are

        d alpha_o = c sum(G_o h_o)
        d w_o     = c alpha_o r_o (G_o - mean(G_o) - h_o mean(G_o h_o))
    """

    c: float
    h: Tensor
    """`(O, K)`."""
    scale: Tensor
    """`c alpha r`, `(O, 1)`."""


def standardization(layer: StandardizedLayer, dtype: torch.dtype) -> Standardization:
    """The statistics of a layer in `dtype`, a filter's entries in the order of `rows`."""
    weight_OK = rows(layer, layer.weight.detach()).to(dtype)
    c, gamma = constants(weight_OK, layer.gain, layer.gamma, layer.relative_gamma)
    smaller_O1 = (LARGE / weight_OK.abs().amax(1, keepdim=True)).clamp(max=1.0)  # else a square could overflow
    centred_OK = weight_OK * smaller_O1
    centred_OK -= centred_OK.mean(1, keepdim=True)
    rstd_O1 = (centred_OK.square().mean(1, keepdim=True) + gamma).rsqrt()
    alpha_O1 = layer.alpha.detach().to(dtype).unsqueeze(1)
    return Standardization(c, centred_OK * rstd_O1, c * alpha_O1 * rstd_O1 * smaller_O1)
