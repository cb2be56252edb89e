"""The pictures of a grid: a heat map a method, accuracy against what varies, accuracy by step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pws.bench.accuracy.table import Summary, rates_of, summarize
from pws.bench.figure import new_figure, save_figure
from pws.bench.pictures import COLOURS
from pws.training.recipe_file import recipe_of

Result = Mapping[str, Any]
Summaries = Mapping[tuple[str, str], Summary]
PANEL: Final = (3.4, 2.6)
"""Inches of a panel."""


def draw_heat(result: Result, path: Path) -> None:
    """A panel a method: mean accuracy by learning rate, a line a network and batch size."""
    summaries, groups = summarize(result), rates_of(result)
    rates = sorted({lr for group in groups.values() for lr, _ in group})
    rows = _rows(result)
    width = 0.8 + 0.075 * max(map(len, groups)) + 0.62 * len(rates)
    figure, panels = _panels(len(rows), (width, 1.1 + 0.42 * len(groups)))
    for axes, row in zip(panels, rows, strict=False):
        grid = [[_value(summaries, row, dict(group).get(lr)) for lr in rates] for group in groups.values()]
        axes.imshow(grid, vmin=10, vmax=95, cmap="RdYlGn", aspect="auto")
        for y, group in enumerate(groups.values()):
            for x, lr in enumerate(rates):
                column = dict(group).get(lr)
                if column is not None and (row, column) in summaries:
                    colour = "white" if grid[y][x] < 25 else "black"
                    text = _short(summaries[row, column])
                    axes.text(x, y, text, ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(len(rates)), [f"{lr:.3g}" for lr in rates], fontsize=7, rotation=45)
        axes.set_yticks(range(len(groups)), list(groups), fontsize=7)
        axes.set_title(row, fontsize=10)
    figure.supxlabel("learning rate", fontsize=9)
    save_figure(figure, path)


def draw_lines(result: Result, path: Path) -> None:
    """Accuracy against the learning rate, a panel a network and batch size of several rates; against the batch size, a panel
    a network, where there are three or more; else a line of dots a column."""
    groups = {name: rates for name, rates in rates_of(result).items() if len(rates) > 1}
    panels = [(name, "learning rate", rates) for name, rates in groups.items()]
    if not panels:
        batches = _batches(result)
        panels = [(name, "batch size", sizes) for name, sizes in batches.items() if len(sizes) > 2]
    if not panels:
        _draw_dots(result, path)
        return
    figure, axes_list = _panels(len(panels), (4.6, 3.6), columns=2)
    for axes, (name, what, points) in zip(axes_list, panels, strict=False):
        _accuracies(axes, result, points)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(what)
        axes.set_xscale("log")
        axes.set_xticks([x for x, _ in points], [f"{x:.3g}" for x, _ in points], fontsize=8)
        axes.minorticks_off()
    axes_list[0].set_ylabel("test accuracy, % (0: non-finite)")
    _legend(figure, axes_list[0])
    save_figure(figure, path)


def _draw_dots(result: Result, path: Path) -> None:
    summaries, columns = summarize(result), result["columns"]
    height = max(1.2 + 0.4 * len(columns), 0.6 + 0.2 * len(result["rows"]))
    figure = new_figure(5.5 + 0.07 * max(map(len, columns)), height)
    axes = figure.subplots()
    for number, row in enumerate(_rows(result)):
        values = [_value(summaries, row, column) for column in columns]
        axes.plot(values, range(len(columns)), "o", label=row, **_style(row, number))
    axes.set_yticks(range(len(columns)), columns, fontsize=8)
    axes.set_ylim(len(columns) - 0.5, -0.5)
    axes.set_xlabel("test accuracy, % (0: non-finite)", fontsize=9)
    axes.grid(alpha=0.3)
    _legend(figure, axes)
    save_figure(figure, path)


def draw_curves(result: Result, path: Path) -> None:
    """Accuracy on the first test images by step, mean over the seeds, a panel a column, and the target."""
    columns = [column for column in result["columns"] if any(cell["column"] == column for cell in result["cells"])]
    figure, panels = _panels(len(columns), PANEL)
    for axes, column in zip(panels, columns, strict=False):
        for number, row in enumerate(_rows(result)):
            curves = [c["curve"] for c in result["cells"] if (c["row"], c["column"]) == (row, column)]
            length = min((len(curve) for curve in curves), default=0)
            steps = [step for step, _ in curves[0][:length]] if curves else []
            means = [100 * statistics.fmean(curve[i][1] for curve in curves) for i in range(length)]
            axes.plot(steps, means, label=row, linewidth=1.3, **_style(row, number))
        axes.axhline(100 * result["target"], color="black", linewidth=0.8, linestyle=":")
        axes.set_title(column, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.set_ylim(0, 100)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("accuracy on the first test images, %", fontsize=9)
    _legend(figure, panels[0])
    save_figure(figure, path)


def _accuracies(axes: Axes, result: Result, points: Sequence[tuple[float, str]]) -> None:
    summaries = summarize(result)
    for number, row in enumerate(_rows(result)):
        shown = [(x, _value(summaries, row, column)) for x, column in points]
        shown = [(x, y) for x, y in shown if math.isfinite(y)]
        axes.plot(*zip(*shown, strict=True), "o-", label=row, markersize=4, linewidth=1.3, **_style(row, number))
    axes.grid(alpha=0.3)


def _batches(result: Result) -> dict[str, list[tuple[float, str]]]:
    """Network to batch sizes, in order, each with its column."""
    found: dict[str, dict[float, str]] = {}
    for cell in result["cells"]:
        recipe = recipe_of(cell["settings"])
        found.setdefault(recipe.model.name, {})[float(recipe.data.batch_size)] = cell["column"]
    return {name: sorted(sizes.items()) for name, sizes in found.items()}


def _value(summaries: Summaries, row: str, column: str | None) -> float:
    """Percent; 0 where a seed went non-finite, NaN where nothing was measured."""
    summary = None if column is None else summaries.get((row, column))
    return math.nan if summary is None else 100 * (summary.mean or 0.0)


def _short(summary: Summary) -> str:
    if summary.non_finite_steps:
        return f"nan@{min(summary.non_finite_steps)}"
    return f"{100 * statistics.fmean(summary.accuracies):.1f}"


def _rows(result: Result) -> list[str]:
    present = {cell["row"] for cell in result["cells"]}
    return [row for row in result["rows"] if row in present]


def _style(row: str, number: int) -> dict[str, Any]:
    """The field's main methods keep their colour in all pictures; bn and pws are drawn on top."""
    colour = COLOURS.get(row) or matplotlib.colormaps["tab20"](number % 20)
    return {"color": colour, "zorder": 3 if row in ("bn", "pws") else 2}


def _panels(count: int, size: tuple[float, float], columns: int = 4) -> tuple[Figure, list[Axes]]:
    across = min(count, columns)
    down = math.ceil(count / across)
    figure = new_figure(size[0] * across, size[1] * down + 0.5)
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
