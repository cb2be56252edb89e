"""The demonstration as a picture: results on the left, average gradients on the right."""

from __future__ import annotations

from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from pws.demo.runs import LEARNING_RATES
from pws.demo.story import Results

COLOURS = {"none": "#c0392b", "wn": "#e67e22", "gn": "#7f8c8d", "bn": "#2471a3", "pws": "#1e8449"}
LINES = {"none": "o-", "wn": "s--", "gn": "o-", "bn": "o-", "pws": "o-"}
"""WN starts as the plain network and would hide it behind a solid line."""
GROUNDS, SHADE = colormaps["RdYlGn"], Normalize(-0.1, 1.25)
"""The colour behind an accuracy."""
FLOOR = 0.1
"""Where the axis of the average gradients ends: PWS's zeros are drawn there."""


def draw(results: Results, path: Path) -> None:
    """Write a PNG."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    _results(left, results)
    _gradients(right, results)
    figure.savefig(path, dpi=120)


def _results(axes: Axes, results: Results) -> None:
    rows = list(dict.fromkeys(run.row for run in results))
    rates = list(LEARNING_RATES.values())
    grid = [[0.0] * len(rates) for _ in rows]
    for run, result in results.items():
        row, column = rows.index(run.row), rates.index(run.lr)
        grid[row][column] = result.accuracy or 0.0
        axes.text(column, row, str(result), ha="center", va="center", color=_ink(grid[row][column]))
    axes.imshow(grid, cmap=GROUNDS, norm=SHADE, aspect="auto")
    axes.set_xticks(range(len(rates)), [f"{name}\n{rate:g}" for name, rate in LEARNING_RATES.items()])
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("learning rate")
    axes.set_title("Test accuracy on the digits")
    axes.tick_params(length=0)


def _ink(accuracy: float) -> str:
    """Black or white, whichever has the higher contrast to the ground of this accuracy: at least 4.5 to 1."""
    red, green, blue = (part**2.2 for part in GROUNDS(SHADE(accuracy))[:3])
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else "white"


def _gradients(axes: Axes, results: Results) -> None:
    first = {run.row: result.average_gradients for run, result in reversed(results.items()) if run.row in COLOURS}
    for method in COLOURS:
        values = [max(value, FLOOR) for value in first[method].values()]
        axes.plot(range(1, len(values) + 1), values, LINES[method], color=COLOURS[method], label=method)
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.text(1, 1.1, "independent gradients", va="bottom", fontsize=9)
    axes.set_yscale("log")
    axes.set_ylim(FLOOR * 0.8, None)
    axes.set_xlabel("layer, from the input to the head")
    axes.set_ylabel("squared average gradient,\n1 = independent gradients")
    axes.set_title("How alike a filter's weights are pushed, first step (pws: 0)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 0.06), ncols=5)
