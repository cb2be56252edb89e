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
    w: Tensor
    """`(O, K)`."""
    mean: Tensor
    """`m`, `(O,)`."""
    rstd: Tensor
    """`r`, `(O,)`."""
    factor: Tensor
    """`c alpha`, `(O,)`."""

    @property
    def h(self) -> Tensor:
        """`(O, K)`."""
        return (self.w - self.mean.unsqueeze(1)) * self.rstd.unsqueeze(1)

    @property
    def scale(self) -> Tensor:
        """`c alpha r`, `(O,)`."""
        return self.factor * self.rstd


def standardization(layer: StandardizedLayer, dtype: torch.dtype) -> Standardization:
    """The statistics of a layer in `dtype`, a filter's entries in the order of `rows`.

    A weight whose squares would overflow is made smaller, which leaves h as it is. `factor` is made smaller too: the gradient
    is that of the layer's own weight.
    """
    weight_OK = rows(layer, layer.weight.detach()).to(dtype)
    c, gamma = constants(weight_OK, layer.gain, layer.gamma, layer.relative_gamma)
    smaller_O1 = (LARGE / weight_OK.abs().amax(1, keepdim=True)).clamp(max=1.0)
    weight_OK = weight_OK * smaller_O1
    variance_O, mean_O = torch.var_mean(weight_OK, 1, correction=0)
    factor_O = c * layer.alpha.detach().to(dtype) * smaller_O1[:, 0]
    return Standardization(c, weight_OK, mean_O, (variance_O + gamma).rsqrt(), factor_O)
