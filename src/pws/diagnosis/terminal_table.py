"""A diagnosis as a table for the terminal."""

from __future__ import annotations

import math

from rich import box
from rich.markup import escape
from rich.table import Table

from pws.diagnosis.layer import LayerDiagnosis
from pws.diagnosis.measurement import Measurement
from pws.diagnosis.verdicts import Verdict

COLUMNS = ("layer", "Var out", "out/in", "shift", "n ratio", "E part", "crit. LR")
CAPTION = escape(
    "out/in: variance transmission. shift: share of Var out that the filters' means make. n ratio: average-gradient ratio "
    "times n; 1 if the gradients of a filter are independent. E part: its share due to N E[delta] E[xbar]. crit. LR: there, "
    "one step moves the filters' means so far that they double Var out. In brackets: no risk, for a norm follows or the layer "
    "is a gate."
)


def terminal_table_of(measurement: Measurement, verdict: Verdict) -> Table:
    """Lay out one row per layer, in execution order, within 80 columns."""
    lr = measurement.settings.lr
    table = Table(box=box.SIMPLE_HEAD, caption=CAPTION, caption_justify="left", padding=(0, 1, 0, 0))
    columns = [*COLUMNS, *([] if lr is None else [f"at LR {lr:g}"])]
    for name in columns:
        table.add_column(name, justify="left" if name == "layer" else "right", no_wrap=name != "layer", overflow="fold")
    worst = verdict.layer if verdict.cause != "healthy" else None
    for layer, share in zip(measurement.layers, measurement.predicted_shift_shares(), strict=True):
        cells = [*row_of(layer), *([] if lr is None else [percent(share)])]
        table.add_row(*cells, style="bold red" if layer.name == worst else None)
    return table


def row_of(layer: LayerDiagnosis) -> list[str]:
    """A layer's cells in the order of `COLUMNS`."""
    ratio, critical = layer.average_gradient_ratio, number(layer.critical_lr)
    return [
        escape(layer.name) + (f" [dim]{layer.note}[/dim]" if layer.note else ""),
        number(layer.output.variance),
        number(layer.transmission),
        percent(layer.shift_share),
        number(None if ratio is None else ratio * layer.fan_in),
        percent(layer.expectation_share),
        critical if layer.counts else f"({critical})",
    ]


def number(value: float | None) -> str:
    """Three digits; a dash for what is not there."""
    if value is None:
        return "-"
    if math.isinf(value):
        return "none" if value > 0 else "-inf"
    return "0" if abs(value) < 1e-9 else f"{value:.3g}"


def percent(share: float | None) -> str:
    """A share as a percentage."""
    return "-" if share is None else "nan" if math.isnan(share) else f"{100 * share:.0f} %"
