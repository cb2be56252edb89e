"""The main figures as a static picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter

from pws.diagnosis.diagnosis import Diagnosis
from pws.diagnosis.report.marks import NAMES, SHARES, Axis, Kind, log_axis, power, split
from pws.diagnosis.report.words import danger, lr_words, ratio_of, shift_of, short, why_no_backward

BLUE, GREEN, ORANGE, GREY, INK = "#0b5fae", "#00755a", "#b8420a", "#5d6670", "#1c2127"
SYMBOLS: dict[Kind, str] = {"zero": "v", "infinite": "^", "undefined": "x"}
TITLE: dict[str, Any] = {"loc": "left", "fontsize": 11, "fontweight": "bold", "color": INK}
COLUMNS = 4
"""Of a legend."""
FEW = 48
"""Layers up to which their marks are drawn large."""
LABELS = 32
"""The most layer names under a panel."""


def draw(diagnosis: Diagnosis, path: Path) -> None:
    """Write a PNG."""
    figure = Figure(figsize=(14, 9), layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12))
    FigureCanvasAgg(figure)
    (left, right), (below_left, below_right) = figure.subplots(2, 2)
    _variance(left, diagnosis)
    _shift(right, diagnosis)
    _ratio(below_left, diagnosis)
    _critical(below_right, diagnosis)
    heading = f"{diagnosis.model}: {diagnosis.verdict.finding}"
    figure.suptitle(
        "\n".join(textwrap.wrap(heading, 120, max_lines=3)), x=0.01, ha="left", fontsize=13, color=INK, parse_math=False
    )
    figure.savefig(path, dpi=120, format="png")


def _variance(axes: Axes, diagnosis: Diagnosis) -> None:
    layers = diagnosis.layers
    series: dict[str, tuple[list[float], dict[str, Any]]] = {
        "Var in": (
            [layer.input.variance for layer in layers],
            {"color": GREY, "marker": "o", "ls": ":", "mfc": "none"},
        ),
        "Var out": ([layer.output.variance for layer in layers], {"color": BLUE, "marker": "o", "lw": 2}),
        "centred part": ([layer.centred for layer in layers], {"color": GREEN, "marker": "s", "ls": "--", "ms": 4}),
        "shift part": ([shift_of(layer) for layer in layers], {"color": ORANGE, "marker": "D", "ls": "-.", "ms": 4}),
    }
    axis = log_axis([value for values, _ in series.values() for value in values])
    for name, (values, look) in series.items():
        _plot(axes, name, values, axis, look)
    _finish(axes, diagnosis, "Variance along the depth: level is good", axis)


def _shift(axes: Axes, diagnosis: Diagnosis) -> None:
    shares = [layer.shift_share for layer in diagnosis.layers]
    bars = [share if SHARES.kind(share) == "value" else 0.0 for share in shares]
    axes.bar(range(len(bars)), bars, color=BLUE, width=0.75, label="now")
    unknown = [share if SHARES.kind(share) != "value" else None for share in shares]
    _plot(axes, "", unknown, SHARES, {"color": BLUE})
    later = diagnosis.predicted_shift_shares()
    if any(share is not None for share in later):
        _plot(
            axes,
            f"after {lr_words(diagnosis)}",
            later,
            SHARES,
            {"color": ORANGE, "marker": "D", "ls": "", "mfc": "none"},
        )
    _finish(axes, diagnosis, "Shift share: output variance made by the filters' means", SHARES)


def _ratio(axes: Axes, diagnosis: Diagnosis) -> None:
    values = [ratio_of(layer) for layer in diagnosis.layers]
    expected = [layer.independent_ratio for layer in diagnosis.layers]
    axis = log_axis([*values, *expected])
    _plot(axes, "average-gradient ratio", values, axis, {"color": BLUE, "marker": "o", "ls": ""})
    _plot(
        axes,
        "1/n: independent gradients",
        expected,
        axis,
        {"color": ORANGE, "marker": "_", "ls": "", "ms": 9, "mew": 2},
    )
    _finish(axes, diagnosis, "Average-gradient ratio: 1 if a step pushes all weights alike", axis, seen=values)


def _critical(axes: Axes, diagnosis: Diagnosis) -> None:
    values, lr = [layer.critical_lr for layer in diagnosis.layers], diagnosis.settings.lr
    axis = log_axis([*values, lr])
    looks: dict[str, tuple[str, dict[str, Any]]] = {
        "safe": ("critical LR", {"color": BLUE, "marker": "o"}),
        "unsafe": ("critical LR, at or below the one judged", {"color": ORANGE, "marker": "D"}),
        "normalized": ("critical LR, a norm follows, or a gate", {"color": GREY, "marker": "o", "mfc": "none"}),
    }
    for kept, (name, look) in looks.items():
        chosen = [layer.critical_lr if danger(layer, lr) == kept else None for layer in diagnosis.layers]
        _plot(axes, name, chosen, axis, {**look, "ls": ""})
    if lr is not None:
        axes.axhline(lr, color=INK, ls="--", lw=1.2, label=f"LR judged: {lr:g}")
    _finish(axes, diagnosis, "Critical LR: one step there doubles the variance", axis, seen=values)


def _plot(axes: Axes, name: str, values: Sequence[float | None], axis: Axis, look: dict[str, Any]) -> None:
    """Draw values; what is no positive number stands at the end of the axis as what it is."""
    kinds = split(values, axis)
    drawn = [float("nan") if i not in kinds.get("value", ()) else float(value or 0) for i, value in enumerate(values)]
    if kinds.get("value"):
        axes.plot(
            range(len(values)),
            drawn,
            label=name,
            **{"ms": 6, **look, **({} if len(values) <= FEW else {"ms": 3, "lw": 1})},
        )
    known = {str(line.get_label()) for line in axes.lines}
    for kind, symbol in SYMBOLS.items():
        at = kinds.get(kind, [])
        if at:
            word = NAMES[kind] if "value" in kinds or not name else f"{name}: {NAMES[kind]}"
            label = "_again" if word in known else word
            places = [axis.place(float(values[i] or 0)) for i in at]
            fill = look["color"] if kind == "infinite" else "none"
            axes.plot(at, places, symbol, ms=7, mew=1.5, color=look["color"], mfc=fill, label=label)


def _finish(
    axes: Axes, diagnosis: Diagnosis, title: str, axis: Axis, seen: Sequence[float | None] | None = None
) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    if seen is not None and all(value is None for value in seen):
        axes.clear()
        axes.set_axis_off()
        axes.set_title(title, **TITLE)
        why = textwrap.fill(f"Not drawn: {why_no_backward(diagnosis)}.", 60)
        axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes, parse_math=False)
        return
    axes.set_yscale("log" if axis.log else "linear")
    axes.set_ylim(*(power(end) if axis.log else end for end in axis.limits))
    if not axis.log:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="y", color="#e6e9ed", zorder=0)
    axes.set_axisbelow(True)
    _names(axes, diagnosis)
    entries = sorted(
        zip(*axes.get_legend_handles_labels(), strict=True), key=lambda entry: entry[1].endswith((*NAMES.values(),))
    )
    axes.set_title(title, pad=8 + 17 * -(-len(entries) // COLUMNS), **TITLE)
    axes.legend(
        *zip(*entries, strict=True),
        fontsize=9,
        frameon=False,
        ncols=COLUMNS,
        loc="lower left",
        bbox_to_anchor=(-0.01, 1),
        borderaxespad=0.2,
    )


def _names(axes: Axes, diagnosis: Diagnosis) -> None:
    every = -(-len(diagnosis.layers) // LABELS)
    at = range(0, len(diagnosis.layers), every)
    names = [short(diagnosis.layers[i].name) for i in at]
    turn: dict[str, Any] = (
        {"rotation": 90} if len(names) > 20 else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    )
    axes.set_xticks(list(at), names, fontsize=8, parse_math=False, **turn)
    axes.set_xlim(-0.7, len(diagnosis.layers) - 0.3)
