"""The result of a diagnosis: what was measured, the verdict, and the ways to show both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pws.diagnosis.layer import Filters, LayerDiagnosis
from pws.diagnosis.measurement import Measurement
from pws.diagnosis.report import write_picture, write_report
from pws.diagnosis.verdicts import Verdict, verdict_of

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Diagnosis(Measurement):
    """A network on one batch, layer by layer in execution order, and what is wrong with it."""

    verdict: Verdict
    """Which layer, which cause, what to do."""

    @classmethod
    def of(cls, measurement: Measurement) -> Diagnosis:
        """Draw the verdict from what was measured."""
        measured = {field.name: getattr(measurement, field.name) for field in fields(Measurement)}
        return cls(**measured, verdict=verdict_of(measurement))

    def __repr__(self) -> str:
        return f"Diagnosis of {self.model}, {len(self.layers)} layers. {self.verdict}"

    def to_dict(self, *, filters: bool = False) -> dict[str, Any]:
        """Return everything as plain values for JSON.

        Numbers that are not finite become None. `filters` adds the numbers of each filter.
        """
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
        """Return a table for the terminal. Needs rich."""
        from pws.diagnosis.terminal_table import terminal_table_of  # rich comes with an extra

        return terminal_table_of(self, self.verdict)

    def html(self, path: str | Path, *, history: Sequence[Diagnosis] = (), title: str = "") -> Path:
        """Write the report, one file that opens without a network. Needs the extra `report`.

        Args:
            path: the file; missing folders are made.
            history: the diagnoses that a `Monitor` took during training, for a chart over the steps.
            title: of the page; by default it names the model.
        """
        return write_report(Path(path), self, self.verdict, history, title)

    def png(self, path: str | Path) -> Path:
        """Write the main charts as a static picture. Needs the extra `report`."""
        return write_picture(Path(path), self, self.verdict)


def _at_rate(layer: LayerDiagnosis, lr: float | None, share: float | None) -> dict[str, Any]:
    """What the judged learning rate does to a layer."""
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
