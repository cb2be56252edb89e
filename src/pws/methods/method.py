"""What a method is: how a network builds its convolutions, norms, activations and head, and what is done to the gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

Norm = Callable[[int], nn.Module]
"""From the number of channels to the module."""
GradientRule = Callable[[nn.Module, Optimizer], None]
"""Changes the gradients of a network in place, between the backward pass and the optimizer's step."""


class ConvBuilder(Protocol):
    """Builds a 2-d convolution; `bias` tells whether no norm with a bias of its own follows."""

    def __call__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, padding: int = 0, bias: bool
    ) -> nn.Module:
        """The convolution."""


@dataclass(frozen=True)
class Method:
    """One way to normalize a network, or not to."""

    name: str
    source: str
    conv: ConvBuilder
    head: Callable[[int, int], nn.Module] = nn.Linear
    """`(in_features, num_classes)` to the last layer."""
    norm: Norm | None = None
    """The norm of every convolution; None for methods that leave outputs alone."""
    activation: Callable[[], nn.Module] = nn.ReLU
    """What follows the norm, or the convolution where there is none."""
    end_norm: Norm | None = None
    """For methods without `norm`: the norm that a deep ResNet keeps behind its stem and in front of its head."""
    end_branch: Callable[[nn.Module, int], nn.Module] | None = None
    """For methods without `norm`: `(last convolution of a residual branch, blocks of the network)` to what stands there, so
    that the residual stream keeps its variance. None: the stream is divided by sqrt(2) at each addition."""
    gradients: GradientRule | None = None
    """What is done to the gradients before each step."""
    step_bound: float | None = None
    """The longest step of a layer with momentum 0.9; None for methods that do without."""


def plain_conv(in_channels: int, out_channels: int, kernel_size: int, **settings: Any) -> nn.Module:
    """torch's convolution, Kaiming normal, bias 0."""
    return kaiming(nn.Conv2d(in_channels, out_channels, kernel_size, **settings))


def kaiming(conv: nn.Conv2d) -> nn.Conv2d:
    """Kaiming normal weights for ReLU, bias 0."""
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv
