"""How much shorter each layer's step must be: one bound for every layer, and no step on gradients that are not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

STEP_BOUND: Final = 0.03
"""The longest step of a layer of PWS: about the largest that training held at every batch size (methods.md in docs)."""


def peak_lr(group: dict[str, Any]) -> float:
    """The largest rate of a group over its schedule, as far as the group tells."""
    return max(float(group[key]) for key in ("lr", "initial_lr", "max_lr") if key in group)


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


def ahead_of(group: dict[str, Any]) -> float:
    """The largest rate of a group's schedule over its present one: a step that is measured at the largest rate shrinks with the
    schedule even where it is cut to the bound."""
    lr = float(group["lr"])
    return peak_lr(group) / lr if lr > 0 else 1.0
