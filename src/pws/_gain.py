"""The gain that preserves variance when the filters have zero mean.

A zero-mean filter does not see the mean of its input, so a layer behind the activation phi transmits
`gain^2 Var(phi(u)) / Var(u)`. With `u ~ N(0, 1)` the gain that makes this 1 is

    gain = 1 / sqrt(Var(phi(u)))          1.7129 for ReLU, where Kaiming's sqrt(2) leaves 0.68 a layer
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from pws._errors import PwsError, UnknownNameError

PAPER_GAIN: Final = 2.0**0.5
"""The published constant, `c = sqrt(2 / fan_in)`: Kaiming's gain for ReLU. It loses a third of the variance per layer."""

ACTIVATIONS: Final = (
    *("celu", "elu", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid"),
    *("mish", "relu", "relu6", "rrelu", "selu", "sigmoid", "silu", "softplus", "softshrink", "softsign", "tanh"),
    "tanhshrink",
)
"""The elementwise activations of `torch.nn.functional`, with their default parameters; beside them "linear"."""


def variance_preserving_gain(activation: str) -> float:
    """`1 / sqrt(Var(phi(u)))` for `u ~ N(0, 1)`, by quadrature; `activation` is a name from `ACTIVATIONS` or "linear".

    Examples:
        >>> round(variance_preserving_gain("relu"), 4)
        1.7129
        >>> variance_preserving_gain("linear")
        1.0

    Raises:
        UnknownNameError: for any other name.
    """
    if activation not in _GAINS:
        raise UnknownNameError("activation", activation, _GAINS)
    return _GAINS[activation]


def _quadrature(activation: str) -> float:
    # Gauss-Legendre with 3 nodes in each sixteenth of [-12, 12]: the kinks and jumps of torch's activations (0, +-0.5,
    # +-1, +-3, 6) fall on the ends of panels, where there is no node. Gauss-Hermite would smear them.
    with torch.device("cpu"):
        edges = torch.linspace(-12, 12, 24 * 16 + 1, dtype=torch.float64)
        nodes = torch.tensor([-(0.6**0.5), 0.0, 0.6**0.5], dtype=torch.float64)
        weights = torch.tensor([5.0, 8.0, 5.0], dtype=torch.float64)
    u = (edges[:-1, None] + edges[1:, None]) / 2 + nodes / 32
    mass = weights * torch.exp(-u * u / 2)
    mass = mass / mass.sum()
    phi: Tensor = getattr(F, activation)(u)
    mean = (mass * phi).sum()
    return float((mass * (phi - mean).square()).sum().rsqrt())


# Computed once, here: a tensor computation in a constructor or under torch.compile would meet whatever mode is active.
_GAINS: Final = {"linear": 1.0, **{activation: _quadrature(activation) for activation in ACTIVATIONS}}


def resolve_gain(gain: float | str) -> float:
    """The number that `gain` stands for: itself, or the variance-preserving gain of the activation it names."""
    number = variance_preserving_gain(gain) if isinstance(gain, str) else gain
    if not isinstance(number, (int, float)) or not 0 < number < float("inf"):
        raise PwsError(
            f"gain must be a positive finite number or the name of an activation; got {gain!r}. "
            f'Use "relu" for a layer behind a ReLU, or pws.PAPER_GAIN for the published constant.'
        )
    return float(number)
