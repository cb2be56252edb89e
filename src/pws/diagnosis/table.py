"""A diagnosis as a table for the terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from pws.diagnosis.diagnosis import Diagnosis
    from pws.diagnosis.layer import LayerDiagnosis

COLUMNS = ("layer", "Var in", "Var out", "out / in", "shift share", "avg. gradient", "E part", "critical LR")
CAPTION = escape(
    "out / in: variance transmission. shift share: part of Var out due to the filters' means. avg. gradient: average-gradient "
    "ratio times n, 1 if a filter's gradients were independent. E part: its share due to N E[delta] E[xbar]. critical LR: "
    "where one step moves the filters' means so far that they double Var out."
)


def table_of(diagnosis: Diagnosis) -> Table:
    """One row a layer, in execution order."""
    lr = diagnosis.settings.lr
    table = Table(box=box.SIMPLE_HEAD, caption=CAPTION, caption_justify="left", title_justify="left")
    columns = [*COLUMNS, *([] if lr is None else [f"share at LR {lr:g}"])]
    for name in columns:
        table.add_column(name, justify="left" if name == "layer" else "right", no_wrap=name == "layer")
    worst = diagnosis.critical_layer
    for layer, share in zip(diagnosis.layers, diagnosis.predicted_shift_shares(), strict=True):
        cells = [*row_of(layer), *([] if lr is None else [percent(share)])]
        table.add_row(*cells, style="bold red" if layer is worst and _unsafe(layer, lr) else None)
    return table


def row_of(layer: LayerDiagnosis) -> list[str]:
    """A layer's cells in the order of `COLUMNS`."""
    ratio = layer.average_gradient_ratio
    return [
        f"{layer.name} {layer.kind} {'x'.join(map(str, layer.kernel_shape))}"
        + (f" ({layer.note})" if layer.note else ""),
        number(layer.input.variance),
        number(layer.output.variance),
        number(layer.transmission),
        percent(layer.shift_share),
        number(None if ratio is None else ratio * layer.fan_in),
        percent(layer.expectation_share),
        number(layer.critical_lr),
    ]


def number(value: float | None) -> str:
    """Three digits; a dash for what is not there."""
    if value is None:
        return "-"
    if math.isinf(value):
        return "none" if value > 0 else "-inf"
    return f"{value:.3g}"


def percent(share: float | None) -> str:
    """A share as a percentage."""
    return "-" if share is None else "nan" if math.isnan(share) else f"{100 * share:.0f} %"


def _unsafe(layer: LayerDiagnosis, lr: float | None) -> bool:
    return lr is not None and layer.critical_lr is not None and layer.critical_lr < lr
