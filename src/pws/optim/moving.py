"""What one step moves: marked layers with their kernels, and plain parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from pws.kernels import Step, steps_of
from pws.optim.base import NonFiniteGradientError, StandardizingOptimizer
from pws.optim.bound import by_layer, factors_of
from pws.optim.layer import Layer
from pws.optim.sharding import local, sum_over_shards

FUSED: Final = ("cpu", "cuda", "xpu", "mps")
"""The devices with fused steps in torch."""
Rates = Callable[[Tensor, Tensor | None, dict[str, Any], dict[str, Any] | None], tuple[Any, tuple[float, float, float]]]


@dataclass
class Moving:
    """The parameters of one step."""

    weights: list[Tensor]
    layers: list[Layer]
    """Of `weights`."""
    steps: list[tuple[Step, list[int]]]
    """Of `layers`, with their numbers."""
    plain: list[Tensor]
    plain_layers: list[int]
    """Tells which of `plain` belong to one layer."""
    groups: dict[Tensor, dict[str, Any]]

    def squares(self, of: Callable[[Step], Tensor]) -> Tensor:
        """A number of each marked layer `(L,)`, over all processes."""
        if len(self.steps) == 1:
            return sum_over_shards(of(self.steps[0][0]), self.weights)
        found: list[Any] = [None] * len(self.layers)
        for step, numbers in self.steps:
            for i, square in zip(numbers, of(step), strict=True):
                found[i] = square.to(self.layers[0].w.device)
        return sum_over_shards(torch.stack(found), self.weights) if found else torch.zeros(0)

    def apply(self, move: Callable[[Step, Tensor], None], factors: Tensor) -> None:
        """Move each marked layer by its factor."""
        for step, numbers in self.steps:
            own = factors if len(self.steps) == 1 else factors[numbers]
            move(step, own.to(self.layers[numbers[0]].w.device))

    def plain_factors(self, tensors: Sequence[Tensor], rates: Sequence[float], bound: float | None) -> list[Tensor]:
        """A factor for each plain parameter, whose layer's step is as long as `tensors` times `rates`."""
        norms = norms_of(tensors)
        squares = (norms * norms.new_tensor(list(rates))).square()
        squares = by_layer(sum_over_shards(squares, self.plain), self.plain_layers)
        return list(factors_of(squares, bound).unbind())

    def cut_plain(self, before: Sequence[Tensor], bound: float | None) -> None:
        """Shorten the step that the plain parameters have taken from `before`."""
        if bound is None:
            return
        after = [local(p) for p in self.plain]
        changes = [new - old for new, old in zip(after, before, strict=True)]
        factors = self.plain_factors(changes, [1.0] * len(changes), bound)
        for new, old, change, factor in zip(after, before, changes, factors, strict=True):
            new.copy_(torch.where(factor < 1, old + change * factor.to(new.device, new.dtype), new))


def moving(
    optimizer: StandardizingOptimizer, rates: Rates, moments: tuple[str, ...], parameters: Iterable[Tensor] | None
) -> Moving | None:
    """What has a gradient, all or of `parameters`; None if nothing has."""
    groups = optimizer._with_gradients(parameters)
    if not groups:
        return None
    weights, layers, taken = [], [], set()
    for weight, group in groups.items():
        if optimizer._members[weight].mark is None:
            continue
        bias = optimizer._bias_of(weight, groups)
        found, peaks = rates(weight, bias, group, None if bias is None else groups[bias])
        weights.append(weight)
        layers.append(optimizer._layer(weight, bias, found, peaks, moments))
        taken |= {weight, bias}
    plain = [parameter for parameter in groups if parameter not in taken]
    numbers = [id(optimizer._layers[parameter]) for parameter in plain]
    return Moving(weights, layers, steps_of(layers), plain, numbers, groups)


def norms_of(tensors: Sequence[Tensor]) -> Tensor:
    """The length of each tensor, in float32 at least, on the device of the first."""
    norms = torch._foreach_norm(list(tensors))
    wide = torch.promote_types(norms[0].dtype, torch.float32)
    return torch.stack([norm.to(norms[0].device, wide) for norm in norms])


def check_finite(optimizer: StandardizingOptimizer, squares: Tensor, now: Moving) -> None:
    """Raise `NonFiniteGradientError` if a gradient is not finite, in any process."""
    total = squares.sum()
    if now.plain:
        total = total + norms_of([local(p.grad) for p in now.plain]).sum().to(total.device)  # type: ignore[arg-type]
    if torch.isfinite(total):
        return
    bad = [
        *(layer.name for layer, square in zip(now.layers, squares, strict=True) if not torch.isfinite(square)),
        *(optimizer._members[p].name for p in now.plain if not torch.isfinite(local(p.grad)).all()),  # type: ignore[arg-type]
    ]
    raise NonFiniteGradientError(
        f"the gradients of {len(bad)} layers hold NaN or infinity (first: {bad[0] if bad else 'in another process'!r}); the step "
        "was not taken. Likely causes: a loss that overflowed, half precision without a GradScaler, or a "
        "learning rate too large for a model without bound. Lower it, bound the step, or skip this batch."
    )
