"""What one pass through a network measured, before anything is concluded from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pws._errors import PwsError
from pws.diagnosis.layer import LayerDiagnosis


@dataclass(frozen=True)
class Settings:
    """The training that a diagnosis judges."""

    lr: float | None = None
    momentum: float = 0.0
    steps: int = 1
    training: bool = True
    """The model's mode."""

    def __post_init__(self) -> None:
        if self.lr is not None and not (isinstance(self.lr, int | float) and 0 < self.lr < math.inf):
            raise PwsError(f"lr must be positive and finite; got {self.lr!r}. Leave it out to learn the critical one.")
        if not 0 <= self.momentum < 1:
            raise PwsError(f"momentum must be at least 0 and below 1; got {self.momentum!r}. Usual: 0.9.")
        if not isinstance(self.steps, int) or self.steps < 1:
            raise PwsError(f"steps must be a whole number, at least 1; got {self.steps!r}.")


@dataclass(frozen=True, eq=False, kw_only=True)
class Measurement:
    """The numbers of a network on one batch, layer by layer in execution order."""

    layers: tuple[LayerDiagnosis, ...]
    model: str
    """The model's class."""
    loss: float | None
    unused: tuple[str, ...]
    """Layers with a weight that did not run."""
    settings: Settings
    step: int | None = None
    """The training step, if a `Monitor` took it."""

    @property
    def finite_kernels(self) -> bool:
        """Whether all weights are finite."""
        return all(layer.finite_kernel for layer in self.layers)

    @property
    def finite_loss(self) -> bool:
        """Whether the loss and the output of every layer are finite."""
        return all(layer.finite for layer in self.layers) and (self.loss is None or math.isfinite(self.loss))

    @property
    def finite(self) -> bool:
        """Whether the loss, the outputs and the gradients are finite."""
        gradients = [layer.gradient for layer in self.layers if layer.gradient is not None]
        return self.finite_loss and all(math.isfinite(gradient.second_moment) for gradient in gradients)

    @property
    def critical_layer(self) -> LayerDiagnosis | None:
        """The layer with the smallest critical learning rate, of those that count; None if none has a finite one."""
        free = [layer for layer in self.layers if layer.counts]
        rated = [layer for layer in free if layer.critical_lr is not None and math.isfinite(layer.critical_lr)]
        return min(rated, key=lambda layer: layer.critical_lr or math.inf) if rated else None

    @property
    def critical_lr(self) -> float:
        """The smallest critical learning rate of the layers that count; infinity if no step can shift these layers, NaN
        without a backward pass."""
        if all(layer.critical_lr is None for layer in self.layers):
            return math.nan
        layer = self.critical_layer
        return math.inf if layer is None or layer.critical_lr is None else layer.critical_lr

    def predicted_shift_shares(self) -> list[float | None]:
        """The shift share of each layer after `settings.steps` steps at `settings.lr`.

        None without a learning rate or a backward pass.
        """
        s = self.settings
        return [
            None if s.lr is None else layer.predicted_shift_share(s.lr, s.momentum, s.steps) for layer in self.layers
        ]
