"""How much shorter each layer's step must be: one bound for every layer, and no step on gradients that are not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from pws._errors import PwsError

STEP_BOUND: Final = 0.03
"""The longest step of a layer of PWS: about the largest that training held at every batch size (methods.md in docs), with
momentum 0.9, whose steps add up to tenfold ones."""
USUAL_MOMENTUM: Final = 0.9
Bound = float | Literal["auto"]
"""A bound, or the one that belongs to the momentum (`bound_with`)."""


def bound_with(momentum: float, steps: int | None = None, usual: float = STEP_BOUND) -> float:
    """The bound on a gradient step with which SGD moves a layer as far as with the `usual` one and momentum 0.9.

    Steps at the bound `b`, all in one direction, take a layer `b / (1 - momentum)` further each in the long run, which is to be
    0.3. An optimizer whose momentum starts anew after `steps` steps (a client's in federated training) goes

        sum over j = 1 .. steps of b (1 - momentum^j) / (1 - momentum)

    which is to be 0.3 per step.

    Examples:
        >>> [round(bound_with(momentum), 3) for momentum in (0.0, 0.5, 0.9)]
        [0.3, 0.15, 0.03]
        >>> [round(bound_with(0.9, steps), 3) for steps in (1, 10, 10_000)]
        [0.3, 0.072, 0.03]

    Raises:
        PwsError: steps of this momentum add up without end.
    """
    if not 0 <= momentum < 1:
        raise PwsError(
            f"the usual bound on a step, 0.3 (1 - momentum), needs a momentum of at least 0 and below 1; got {momentum!r}. "
            "Set the bound by hand."
        )
    lasting = usual * ((1 - momentum) / (1 - USUAL_MOMENTUM))
    if steps is None:
        return lasting
    lacking = momentum * (1 - momentum**steps) / (1 - momentum)  # steps' worth that the fresh momentum lacks
    return lasting * steps / (steps - lacking)


def bound_for(optimizer: Optimizer) -> float:
    """The bound that belongs to the largest momentum of an optimizer's groups; to the usual one where they have none."""
    return bound_with(max(float(group.get("momentum", USUAL_MOMENTUM)) for group in optimizer.param_groups))


def is_bound(value: object) -> bool:
    """Whether a step can be bounded by this."""
    return isinstance(value, int | float) and 0 < value < float("inf")


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
