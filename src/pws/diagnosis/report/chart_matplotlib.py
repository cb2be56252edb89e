"""Draws charts with matplotlib, for a static picture."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter

from pws.diagnosis.report.axis import Kind, power
from pws.diagnosis.report.chart import FEW, Chart, Look, Plot

END_SYMBOLS: dict[Kind, str] = {"zero": "v", "infinite": "^", "undefined": "x"}
SYMBOLS = {"circle": "o", "square": "s", "diamond": "D", "line-ew": "_"}
LINES = {"": "", "solid": "-", "dot": ":", "dash": "--", "dashdot": "-."}
LEGEND_COLUMNS = 4
LABELS = 32
"""The most layer names under a chart."""


def save_picture(charts: Sequence[Chart], heading: str, path: Path) -> None:
    """Write a PNG of four charts over layers."""
    figure = Figure(figsize=(14, 9), layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12))
    FigureCanvasAgg(figure)
    colours = light_colours()
    for axes, chart in zip(figure.subplots(2, 2).flat, charts, strict=True):
        _draw(axes, chart, colours)
    wrapped = "\n".join(textwrap.wrap(heading, 145, max_lines=4))
    figure.suptitle(wrapped, x=0.01, ha="left", fontsize=12, color=colours["ink"], parse_math=False)
    figure.savefig(path, dpi=120, format="png")


def light_colours() -> dict[str, str]:
    """The colours of the page in its light theme, by name."""
    css = files("pws.diagnosis.report").joinpath("page.css").read_text(encoding="utf-8")
    return dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6});", css[: css.index("}")]))


def _draw(axes: Axes, chart: Chart, colours: dict[str, str]) -> None:
    title: dict[str, Any] = {"loc": "left", "fontsize": 11, "fontweight": "bold", "color": colours["ink"]}
    if not chart.plots:
        axes.set_axis_off()
        axes.set_title(chart.title, **title)
        why = textwrap.fill(chart.missing, 60)
        axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes, parse_math=False)
        return
    (plot,) = chart.plots
    _series(axes, chart, plot, colours)
    if plot.level is not None:
        height, name = plot.level
        axes.axhline(height, color=colours["ink"], ls="--", lw=1.2, label=name)
    _value_axis(axes, plot, colours)
    _layer_names(axes, chart)
    rows = _legend(axes, plot)
    axes.set_title(chart.title, pad=8 + 17 * rows, **title)


def _series(axes: Axes, chart: Chart, plot: Plot, colours: dict[str, str]) -> None:
    in_legend: set[str] = set()
    for series in plot.series:
        colour, values = colours[series.look.colour], series.drawn(plot.axis)
        if series.look.bars:
            axes.bar(chart.xs, [value or 0.0 for value in values], color=colour, width=0.75, label=series.name)
        elif any(value is not None for value in values):
            drawn = [float("nan") if value is None else value for value in values]
            axes.plot(chart.xs, drawn, label=series.name, **_look(series.look, colour, few=len(values) <= FEW))
        for marks in series.end_marks(plot.axis):
            label = "_again" if marks.name in in_legend else marks.name
            in_legend.add(marks.name)
            fill = colour if marks.kind == "infinite" else "none"
            at = [chart.xs[i] for i in marks.indices]
            axes.plot(at, marks.places, END_SYMBOLS[marks.kind], ms=7, mew=1.5, color=colour, mfc=fill, label=label)


def _look(look: Look, colour: str, *, few: bool) -> dict[str, Any]:
    symbol = SYMBOLS[look.symbol.removesuffix("-open")]
    return {
        "color": colour,
        "marker": symbol,
        "mfc": "none" if look.symbol.endswith("-open") else colour,
        "ls": LINES[look.line],
        "ms": 0.8 * look.size if few else 0.45 * look.size,
        "mew": 2 if symbol == "_" else 1.2,
        "lw": 1.8 if few else 1,
    }


def _value_axis(axes: Axes, plot: Plot, colours: dict[str, str]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_yscale("log" if plot.axis.log else "linear")
    axes.set_ylim(*(power(end) if plot.axis.log else end for end in plot.axis.limits))
    if plot.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel(plot.title, color=colours["ink"])
    axes.grid(axis="y", color=colours["grid"], zorder=0)
    axes.set_axisbelow(True)


def _layer_names(axes: Axes, chart: Chart) -> None:
    every = -(-len(chart.names) // LABELS)
    names = chart.names[::every]
    upright: dict[str, Any] = {"rotation": 90}
    slanted: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(
        list(chart.xs[::every]), list(names), fontsize=8, parse_math=False, **(upright if len(names) > 20 else slanted)
    )
    axes.set_xlim(-0.7, len(chart.names) - 0.3)


def _legend(axes: Axes, plot: Plot) -> int:
    """Put the legend above the axes, first the series in their order, last the marks at an end; returns its rows."""
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    order = [series.name for series in plot.series]
    names = sorted(handles, key=lambda name: order.index(name) if name in order else len(order))
    axes.legend(
        [handles[name] for name in names],
        names,
        fontsize=9,
        frameon=False,
        ncols=LEGEND_COLUMNS,
        loc="lower left",
        bbox_to_anchor=(-0.01, 1),
        borderaxespad=0.2,
    )
    return -(-len(names) // LEGEND_COLUMNS)
