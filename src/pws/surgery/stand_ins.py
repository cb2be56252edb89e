"""What takes the place of a norm where nothing would not do."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

HOOKS: Final = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs"),
    *("_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook"),
)
"""Where a module keeps its hooks: what takes a norm's place has those of the norm."""


def layer_before(stand_in: nn.Module) -> str:
    """Name of the layer right before the norm whose place this takes; "" if none is known."""
    return str(vars(stand_in).get("pws_layer_before", ""))


class Copy(nn.Module):
    """Gives a tensor of its own, as the norm did: something writes over it or makes a view of it, which must not reach the
    norm's input."""

    def forward(self, input: Tensor) -> Tensor:
        """The same numbers."""
        return input.clone()


class Affine(nn.Module):
    """`weight_c * x + bias_c` for each channel `c` of `(N, C, ...)`: what a norm computes in eval mode."""

    def __init__(self, weight: Tensor, bias: Tensor, *, fixed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=not fixed)
        self.bias = nn.Parameter(bias, requires_grad=not fixed)

    def forward(self, input: Tensor) -> Tensor:
        """A tensor of the input's shape."""
        shape = (-1, *[1] * (input.dim() - 2))
        return input * self.weight.view(shape) + self.bias.view(shape)

    @torch.no_grad()
    def standardize(self, input: Tensor, eps: float) -> None:
        """Rescale, so that what had variance 1 and mean 0 in each channel has it on this input."""
        dims = [dim for dim in range(input.dim()) if dim != 1]
        scale = (input.var(dims, correction=0) + eps).rsqrt()
        self.bias.sub_(input.mean(dims) * scale * self.weight)
        self.weight.mul_(scale)
