"""BatchNorm's `E[delta] = 0`, given to Weight Normalization, which lacks it by the paper's argument."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from pws.methods import Method, build_method

BACKWARD_CENTRED: Final = "wn, gradient centred"
OUTPUT_CENTRED: Final = "wn, output centred"


class _CentreGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, signal: Tensor) -> Tensor:
        return signal.view_as(signal)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient - gradient.mean([d for d in range(gradient.dim()) if d != 1], keepdim=True)


class CentreGradient(nn.Module):
    """Nothing forward; backward the output gradient less its mean over each channel: `E[delta] = 0`, as behind BatchNorm."""

    def forward(self, signal: Tensor) -> Tensor:
        """Return the signal."""
        centred: Tensor = _CentreGradient.apply(signal)
        return centred


class CentreOutput(nn.Module):
    """The output less its mean over each channel, plus a bias: BatchNorm without the division.

    Salimans and Kingma 2016, "mean-only". Its backward pass is that of `CentreGradient`, and it is the gradient of what runs
    forward.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, signal: Tensor) -> Tensor:
        """Return the centred signal."""
        return signal - signal.mean([0, 2, 3], keepdim=True) + self.bias[:, None, None]


def method_of(name: str) -> Method:
    """A registered method, or Weight Normalization with `E[delta] = 0`."""
    if name == BACKWARD_CENTRED:
        return replace(build_method("wn"), name=name, norm=lambda _: CentreGradient())
    if name == OUTPUT_CENTRED:
        return replace(build_method("wn"), name=name, norm=CentreOutput)
    return build_method(name)
