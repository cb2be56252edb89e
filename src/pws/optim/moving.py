"""What one step moves: marked layers with their kernels, and plain parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from pws._errors import PwsError
from pws.kernels import Layer, Step
from pws.optim.bound import ahead_of, by_layer, factors_of
from pws.optim.layout import is_dense, same_layout
from pws.optim.sharding import is_sharded, local, sum_over_shards

if TYPE_CHECKING:
    from pws.kernels.cpu import CpuStep

FUSED: Final = ("cpu", "cuda", "xpu", "mps")
"""The devices with fused steps in torch."""
Groups = dict[Tensor, dict[str, Any]]


class NonFiniteGradientError(PwsError):
    """A gradient holds NaN or infinity; the step moved nothing that it belongs to."""


@dataclass
class Moving:
    """The parameters of one step; a plan that serves again as long as the same parameters have gradients."""

    weights: list[Tensor]
    biases: list[Tensor | None]
    layers: list[Layer]
    """The layers that `weights` and `biases` belong to."""
    steps: list[tuple[Step, list[int]]]
    """Each step with the numbers of its `layers`."""
    plain: list[Tensor]
    plain_layers: list[int]
    """Tells which of `plain` belong to one layer."""
    implementation: str | None
    groups: Groups

    def squares(self, of: Callable[[Step], Tensor]) -> Tensor:
        """A number of each marked layer `(L,)`, over all processes."""
        if len(self.steps) == 1:
            return sum_over_shards(of(self.steps[0][0]), self.weights)
        found: list[Any] = [None] * len(self.layers)
        for step, numbers in self.steps:
            for i, square in zip(numbers, of(step), strict=True):
                found[i] = square.to(self.layers[0].w.device)
        return sum_over_shards(torch.stack(found), self.weights) if found else torch.zeros(0, device="cpu")

    def moves_at_once(self, move: Callable[[CpuStep], bool]) -> bool:
        """Move in one call, where nothing else has to be asked: all of it is one step on the CPU, of this process alone.
        False if it can't be, or a gradient is not finite; then nothing has moved."""
        if len(self.steps) != 1 or self.plain or any(map(is_sharded, self.weights)):
            return False
        step: Any = self.steps[0][0]
        return hasattr(step, "bounded_sgd") and move(step)

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
        factors = self.plain_factors(changes, [ahead_of(self.groups[p]) for p in self.plain], bound)
        for new, old, change, factor in zip(after, before, changes, factors, strict=True):
            new.copy_(torch.where(factor < 1, old + change * factor.to(new.device, new.dtype), new))

    def check_finite(self, squares: Tensor, names: Callable[[Tensor], str]) -> None:
        """Raise `NonFiniteGradientError` if a gradient is not finite, in any process."""
        total = squares.sum()
        if self.plain:
            norms = sum_over_shards(norms_of([local(whole_gradient(p)) for p in self.plain]), self.plain)
            total = total + norms.sum().to(total.device)
        if torch.isfinite(total):
            return
        bad = [
            *(layer.name for layer, square in zip(self.layers, squares, strict=True) if not torch.isfinite(square)),
            *(names(p) for p in self.plain if not torch.isfinite(local(whole_gradient(p))).all()),
        ]
        what = (
            "hold NaN or infinity" if self._holds_non_finite() or not bad else "are finite, but their squares overflow"
        )
        raise NonFiniteGradientError(
            f"the gradients of {len(bad)} layers {what} (first: {bad[0] if bad else 'in another process'!r}); "
            "the step was not taken. Likely causes: a loss that overflowed, half precision without a GradScaler, or too "
            "large a learning rate without a bound. Lower it, bound the step, or skip this batch."
        )

    def _holds_non_finite(self) -> bool:
        grads = [*(layer.grad for layer in self.layers), *(layer.bias_grad for layer in self.layers)]
        grads += [local(whole_gradient(p)) for p in self.plain]
        return not all(torch.isfinite(grad).all() for grad in grads if grad is not None)


def gradient_of(parameter: Tensor) -> Tensor:
    """What this process holds of a plain parameter's gradient, laid out as the parameter."""
    grad, held = local(whole_gradient(parameter)), local(parameter)
    return grad if same_layout(grad, held) else torch.empty_like(held, dtype=grad.dtype).copy_(grad)


def can_be_fused(parameters: Sequence[Tensor]) -> bool:
    """Whether torch's fused steps move these: they take memory as it comes."""
    return all(p.device.type in FUSED and is_dense(p) for p in parameters)


def norms_of(tensors: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """The length of each tensor, in `dtype` at least, on the device of the first."""
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else dtype
    norms = torch._foreach_norm(list(tensors), 2, wide)
    return torch.stack([norm.to(norms[0].device) for norm in norms])


def whole_gradient(parameter: Tensor) -> Tensor:
    """The gradient of a parameter that has one, over all processes."""
    assert parameter.grad is not None
    return parameter.grad
