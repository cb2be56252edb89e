"""The result of a diagnosis: numbers, verdict, table, report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pws._errors import PwsError
from pws.diagnosis.layer import Filters, LayerDiagnosis
from pws.diagnosis.verdict import Verdict, verdict_of

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Settings:
    """What a diagnosis is judged by."""

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


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """A network on one batch, layer by layer in execution order."""

    layers: tuple[LayerDiagnosis, ...]
    model: str
    """The model's class."""
    loss: float | None
    unused: tuple[str, ...]
    """Layers with a weight that did not run."""
    settings: Settings
    step: int | None = None
    """The training step, where a `Monitor` took it."""
    explanation: Verdict | None = None
    """The verdict of a `Monitor`, which has seen the steps before."""

    @property
    def finite_kernels(self) -> bool:
        """Tell whether every weight is finite."""
        return all(layer.finite_kernel for layer in self.layers)

    @property
    def finite_loss(self) -> bool:
        """Tell whether the loss and every layer's output are finite."""
        return all(layer.finite for layer in self.layers) and (self.loss is None or math.isfinite(self.loss))

    @property
    def finite(self) -> bool:
        """Tell whether everything is finite, the gradients too."""
        gradients = [layer.gradient for layer in self.layers if layer.gradient is not None]
        return self.finite_loss and all(math.isfinite(gradient.second_moment) for gradient in gradients)

    @property
    def critical_layer(self) -> LayerDiagnosis | None:
        """The layer that counts and has the smallest critical learning rate; None if none has a finite one."""
        free = [layer for layer in self.layers if layer.counts]
        rated = [layer for layer in free if layer.critical_lr is not None and math.isfinite(layer.critical_lr)]
        return min(rated, key=lambda layer: layer.critical_lr or math.inf) if rated else None

    @property
    def critical_lr(self) -> float:
        """The network's critical learning rate: the smallest of the layers that count.

        Infinity if no step can shift those, NaN without a backward pass.
        """
        if all(layer.critical_lr is None for layer in self.layers):
            return math.nan
        layer = self.critical_layer
        return math.inf if layer is None or layer.critical_lr is None else layer.critical_lr

    @cached_property
    def verdict(self) -> Verdict:
        """Which layer, which cause, what to do."""
        return self.explanation or verdict_of(self)

    def predicted_shift_shares(self) -> list[float | None]:
        """Each layer's shift share after `settings.steps` steps at `settings.lr`; None without one or a backward pass."""
        s = self.settings
        return [
            None if s.lr is None else layer.predicted_shift_share(s.lr, s.momentum, s.steps) for layer in self.layers
        ]

    def to_dict(self, *, filters: bool = False) -> dict[str, Any]:
        """Everything as plain values for JSON. Numbers that are not finite are None; `filters` adds those of each filter."""
        return {
            "model": self.model,
            "step": self.step,
            "loss": _plain(self.loss),
            **asdict(self.settings),
            "verdict": {**asdict(self.verdict), "text": str(self.verdict)},
            "critical_lr": _plain(self.critical_lr),
            "critical_layer": None if self.critical_layer is None else self.critical_layer.name,
            "unused": list(self.unused),
            "layers": [
                {**_layer(layer, filters=filters), **_at_rate(layer, self.settings.lr, share)}
                for layer, share in zip(self.layers, self.predicted_shift_shares(), strict=True)
            ],
        }

    def table(self) -> Table:
        """A table for the terminal. Needs rich."""
        from pws.diagnosis.table import table_of

        return table_of(self)

    def html(self, path: str | Path, *, history: Sequence[Diagnosis] = (), title: str = "") -> Path:
        """Write the report, one file that opens without a network. Needs the extra `report`.

        Args:
            path: the file; folders above it are made.
            history: the diagnoses a `Monitor` took during training, for a figure over the steps.
            title: the title of the page; by default it names the model.
        """
        from pws.diagnosis.report import write_report

        return write_report(self, Path(path), history, title)

    def png(self, path: str | Path) -> Path:
        """Write the main figures as a static picture. Needs the extra `report`."""
        from pws.diagnosis.report import write_picture

        return write_picture(self, Path(path))


def _at_rate(layer: LayerDiagnosis, lr: float | None, share: float | None) -> dict[str, Any]:
    """What the learning rate that is judged does to a layer."""
    update = None if lr is None or layer.update_ratio is None else _plain(lr * layer.update_ratio)
    return {"predicted_shift_share": _plain(share), "update_to_weight": update}


def _layer(layer: LayerDiagnosis, *, filters: bool) -> dict[str, Any]:
    values = {
        field.name: _plain(getattr(layer, field.name)) for field in fields(LayerDiagnosis) if field.name != "filters"
    }
    for name in ("shift_share", "independent_ratio", "expectation_share"):
        values[name] = _plain(getattr(layer, name))
    if filters:
        tensors = {field.name: getattr(layer.filters, field.name) for field in fields(Filters)}
        values["filters"] = {
            name: None if t is None else [_plain(v) for v in t.tolist()] for name, t in tensors.items()
        }
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "__dataclass_fields__"):
        return {key: _plain(item) for key, item in asdict(value).items()}
    return list(value) if isinstance(value, tuple) else value
