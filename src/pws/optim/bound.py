"""How much shorter each layer's step must be: one bound for every layer, and no step on gradients that are not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def factors_of(squares: Tensor, bound: float | None) -> Tensor:
    """`min(1, bound / length)` of each squared length."""
    if bound is None:
        return torch.ones_like(squares)
    return (bound * squares.rsqrt()).clamp(max=1.0)  # a length of 0 gives infinity, and then 1


def by_layer(squares: Tensor, layers: Sequence[int]) -> Tensor:
    """The sum over each layer, for every one of its parameters: `layers` tells which each belongs to."""
    numbers = {layer: i for i, layer in enumerate(dict.fromkeys(layers))}
    index = torch.tensor([numbers[layer] for layer in layers], device=squares.device)
    return squares.new_zeros(len(numbers)).index_add_(0, index, squares)[index]
