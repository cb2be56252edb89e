"""The page's table of all layers."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from pws.diagnosis.layer import LayerDiagnosis
from pws.diagnosis.measurement import Measurement
from pws.diagnosis.report.number_format import number, percent, shape
from pws.diagnosis.report.remarks import judged_steps, remark_on

COLUMNS: dict[str, Callable[[LayerDiagnosis], str]] = {
    "kind": lambda layer: layer.kind,
    "kernel": shape,
    "Var in": lambda layer: number(layer.input.variance),
    "Var out": lambda layer: number(layer.output.variance),
    "transmission": lambda layer: number(layer.transmission),
    "centred part": lambda layer: number(layer.centred),
    "shift part": lambda layer: number(layer.shift),
    "shift share": lambda layer: percent(layer.shift_share),
    "Var(dL/dy)": lambda layer: number(None if layer.gradient is None else layer.gradient.variance),
    "average-gradient ratio": lambda layer: number(layer.average_gradient_ratio),
    "1/n": lambda layer: number(layer.independent_ratio),
    "critical LR": lambda layer: number(layer.critical_lr),
}
TEXT = ("kind", "kernel", "note")


def table_section(measurement: Measurement) -> str:
    """One row per layer, with the predicted share if a learning rate was given, and notes if there are any."""
    columns = [*COLUMNS]
    rows = [[column(layer) for column in COLUMNS.values()] for layer in measurement.layers]
    if measurement.settings.lr is not None:
        columns.append(f"share after {judged_steps(measurement)}")
        for row, share in zip(rows, measurement.predicted_shift_shares(), strict=True):
            row.append(percent(share))
    if any(remark_on(layer) for layer in measurement.layers):
        columns.append("note")
        for row, layer in zip(rows, measurement.layers, strict=True):
            row.append(remark_on(layer))
    head = "".join(f'<th scope="col"{_class(name)}>{escape(name)}</th>' for name in ("layer", *columns))
    body = "\n".join(_row(layer.name, columns, row) for layer, row in zip(measurement.layers, rows, strict=True))
    caption = (
        f"All {len(rows)} layers in execution order. – was not measured; ∞ means that no step can shift the layer."
    )
    caption = f"<caption><span>{caption}</span></caption>"
    return f"<table>\n{caption}\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _row(name: str, columns: list[str], cells: list[str]) -> str:
    filled = "".join(f"<td{_class(column)}>{escape(cell)}</td>" for column, cell in zip(columns, cells, strict=True))
    return f'<tr><th scope="row">{escape(name)}</th>{filled}</tr>'


def _class(column: str) -> str:
    return ' class="text"' if column in TEXT else ' class="wide"' if column.startswith("share after") else ""
