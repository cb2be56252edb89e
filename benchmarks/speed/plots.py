"""The pictures of a suite."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pws.bench.plotting import colour_of as method_colour
from pws.bench.plotting import new_figure, save_figure

Stored = Mapping[str, Any]
WAY_COLOURS: Final = {
    "formula": "#82c91e",
    "pws layers": "#7dcea0",
    "pws in backward": "#145a32",
    "pws reference": "#a2d9ce",
}


def draw_cases(result: Stored, path: Path) -> None:
    """A panel per case: each row's ratio to none, median and quartiles."""
    cases = result["cases"]
    across = min(3, len(cases))
    down = -(-len(cases) // across)
    figure = new_figure(4.6 * across, 0.32 * len(result["rows"]) * down + 0.9 * down)
    panels = figure.subplots(down, across, squeeze=False, sharex=True)
    for axes, case in zip(panels.flat, cases, strict=False):
        rows = [row for row in result["rows"] if row in case["rows"] and row != "none"][::-1]
        for y, row in enumerate(rows):
            low, middle, high = case["rows"][row]["ratio"]
            axes.barh(y, middle - 1, left=1, color=colour_of(row, y), height=0.6)
            axes.plot([low, high], [y, y], color="black", linewidth=1.2)
            axes.text(1.005 + max(high - 1, 0), y, f" {middle:.2f}", va="center", fontsize=8)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        axes.set_title(case["case"], fontsize=9)
        axes.margins(x=0.15)
        axes.tick_params(axis="x", labelbottom=True)
    for axes in list(panels.flat)[len(cases) :]:
        axes.set_visible(False)
    figure.supxlabel(
        "time, ratio to the same network without normalization; black: quartiles of the rounds", fontsize=9
    )
    save_figure(figure, path)


def draw_scaling(result: Stored, path: Path) -> None:
    """A panel per varied setting: what each row costs beyond none, in percent of none."""
    settings = list(dict.fromkeys(case["settings"]["vary"] for case in result["cases"] if case["settings"]["vary"]))
    figure = new_figure(4.2 * len(settings), 3.9)
    panels = figure.subplots(1, len(settings), squeeze=False, sharey=True)[0]
    for axes, setting in zip(panels, settings, strict=True):
        cases = [case for case in result["cases"] if case["settings"]["vary"] == setting]
        names = [str(case["settings"][setting]).rpartition(":")[2] for case in cases]
        for number, row in enumerate(r for r in result["rows"] if r != "none"):
            low, middle, high = zip(*(case["rows"][row]["ratio"] for case in cases), strict=True)
            percent = [[100 * (value - 1) for value in values] for values in (low, middle, high)]
            colour = colour_of(row, number)
            axes.plot(names, percent[1], "o-", color=colour, label=row, markersize=4)
            axes.fill_between(names, percent[0], percent[2], color=colour, alpha=0.15, linewidth=0)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xlabel(setting)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("cost beside no normalization, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    save_figure(figure, path)


def colour_of(row: str, number: int) -> Any:
    """The colour of a row: a method's, or that of one of the ways of pws."""
    return WAY_COLOURS.get(row) or method_colour(row, number)
