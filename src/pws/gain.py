"""The gain that preserves variance when the filters have zero mean.

A zero-mean filter does not see the mean of its input, so a layer behind the activation phi transmits
`gain^2 Var(phi(u)) / Var(u)`. With `u ~ N(0, 1)` the gain that makes this 1 is

    gain = 1 / sqrt(Var(phi(u)))          1.7139 for ReLU, where Kaiming's sqrt(2) would leave 0.68 a layer.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from pws.errors import PwsError, UnknownNameError

PAPER_GAIN: Final = 2.0**0.5
"""The published constant, `c = sqrt(2 / fan_in)`: Kaiming's gain for ReLU. It loses a third of the variance a layer."""

ACTIVATIONS: Final = (
    *("celu", "elu", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid"),
    *("mish", "relu", "relu6", "rrelu", "selu", "sigmoid", "silu", "softplus", "softshrink", "softsign", "tanh"),
    "tanhshrink",
)
"""The elementwise activations of `torch.nn.functional`, with their default parameters; beside them "linear"."""


def variance_preserving_gain(activation: str) -> float:
    """`1 / sqrt(Var(phi(u)))` for `u ~ N(0, 1)`, by quadrature; `activation` is a name from `ACTIVATIONS` or "linear".

    >>> round(variance_preserving_gain("relu"), 4)
    1.7139
    >>> variance_preserving_gain("linear")
    1.0

    Raises:
        UnknownNameError: for any other name.
    """
    if activation == "linear":
        return 1.0
    if activation not in ACTIVATIONS:
        raise UnknownNameError("activation", activation, (*ACTIVATIONS, "linear"))
    return _quadrature(activation)


@lru_cache
def _quadrature(activation: str) -> float:
    # Simpson's rule on [-12, 12] with 128 points a unit: the kinks of torch's activations (0, +-0.5, +-1, +-3, 6)
    # fall on the ends of panels, so each panel sees a smooth integrand. Gauss-Hermite would smear the kink.
    with torch.device("cpu"):
        u = torch.linspace(-12, 12, 24 * 128 + 1, dtype=torch.float64)
        simpson = torch.ones_like(u)
    simpson[1:-1:2], simpson[2:-1:2] = 4, 2
    mass = simpson * torch.exp(-u * u / 2)
    mass = mass / mass.sum()
    phi: Tensor = getattr(F, activation)(u)
    mean = (mass * phi).sum()
    return float((mass * (phi - mean).square()).sum().rsqrt())


def resolve_gain(gain: float | str) -> float:
    """The number that `gain` stands for: itself, or the variance-preserving gain of the activation it names."""
    number = variance_preserving_gain(gain) if isinstance(gain, str) else float(gain)
    if not 0 < number < float("inf"):
        raise PwsError(
            f"gain must be a positive finite number or the name of an activation; got {gain!r}. "
            f'Use "relu" for a layer behind a ReLU, or pws.PAPER_GAIN for the published constant.'
        )
    return number
