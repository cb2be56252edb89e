"""The pictures of a grid: a heat map per method, and accuracy against what varies."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pws.bench.grid_tables import SeedSummary, over_seeds, rates_of, settings_of
from pws.bench.plotting import colour_of, new_figure, save_figure
from pws.training.recipe_file import recipe_of

Result = Mapping[str, Any]
Summaries = Mapping[tuple[str, str], SeedSummary]


def draw_heat(result: Result, path: Path) -> None:
    """A panel per method: mean accuracy by learning rate, a line per network and batch size."""
    summaries, groups = over_seeds(result), rates_of(result)
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
    """Accuracy against the learning rate, where there are several: a panel per network and batch size.

    Else against the batch size, where there are three or more: a panel per network. Else a line of dots per column.
    """
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
    axes_list[0].set_ylabel(_score_name(result))
    _legend(figure, axes_list[0])
    save_figure(figure, path)


def _score_name(result: Result) -> str:
    detects = result["settings"].get("task") == "detect"
    return f"{'average precision of boxes' if detects else 'test accuracy'}, % (0: non-finite)"


def _draw_dots(result: Result, path: Path) -> None:
    summaries, columns = over_seeds(result), list(result["columns"])
    height = max(1.2 + 0.4 * len(columns), 0.6 + 0.2 * len(result["rows"]))
    figure = new_figure(5.5 + 0.07 * max(map(len, columns)), height)
    axes = figure.subplots()
    for number, row in enumerate(_rows(result)):
        values = [_value(summaries, row, column) for column in columns]
        axes.plot(values, range(len(columns)), "o", label=row, **_style(row, number))
    axes.set_yticks(range(len(columns)), columns, fontsize=8)
    axes.set_ylim(len(columns) - 0.5, -0.5)
    axes.set_xlabel(_score_name(result), fontsize=9)
    axes.grid(alpha=0.3)
    _legend(figure, axes)
    save_figure(figure, path)


def _accuracies(axes: Axes, result: Result, points: Sequence[tuple[float, str]]) -> None:
    summaries = over_seeds(result)
    for number, row in enumerate(_rows(result)):
        shown = [(x, _value(summaries, row, column)) for x, column in points]
        shown = [(x, y) for x, y in shown if math.isfinite(y)]
        axes.plot(*zip(*shown, strict=True), "o-", label=row, markersize=4, linewidth=1.3, **_style(row, number))
    axes.grid(alpha=0.3)


def _batches(result: Result) -> dict[str, list[tuple[float, str]]]:
    """Network to batch sizes, in order, each with its column."""
    found: dict[str, dict[float, str]] = {}
    for cell in result["cells"]:
        recipe = recipe_of(settings_of(result, cell))
        found.setdefault(recipe.model.name, {})[float(recipe.data.batch_size)] = cell["column"]
    return {name: sorted(sizes.items()) for name, sizes in found.items()}


def _value(summaries: Summaries, row: str, column: str | None) -> float:
    """Percent; 0 where a seed went non-finite, NaN where nothing was measured."""
    summary = None if column is None else summaries.get((row, column))
    return math.nan if summary is None else 100 * (summary.mean or 0.0)


def _short(summary: SeedSummary) -> str:
    if summary.non_finite_steps:
        return f"nan@{min(summary.non_finite_steps)}"
    return f"{100 * statistics.fmean(summary.accuracies):.1f}"


def _rows(result: Result) -> list[str]:
    present = {cell["row"] for cell in result["cells"]}
    return [row for row in result["rows"] if row in present]


def _style(row: str, number: int) -> dict[str, Any]:
    """bn and pws are drawn on top."""
    return {"color": colour_of(row, number), "zorder": 3 if row in ("bn", "pws") else 2}


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
