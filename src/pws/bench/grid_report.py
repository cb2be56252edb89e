"""The files beside a result: its tables in Markdown, its pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pws._files import write_whole
from pws.bench.grid_plots import draw_heat, draw_lines
from pws.bench.grid_tables import VALIDATION, accuracy_table, mask_table, range_table, rate_table, steps_table

SCORES: Final = {"classify": "Test accuracy", "detect": "Average precision of boxes (COCO)"}
"""What a cell shows, by task."""


def write_grid_report(result: Mapping[str, Any], stem: Path) -> list[Path]:
    """Write STEM.md and the pictures; returns what was written."""
    tables = stem.with_suffix(".md")
    write_whole(tables, markdown(result))
    pictures = [stem.with_name(f"{stem.name}-{kind}.png") for kind in ("heat", "lines")]
    for draw, path in zip((draw_heat, draw_lines), pictures, strict=True):
        draw(result, path)
    return [tables, *pictures]


def markdown(result: Mapping[str, Any]) -> str:
    """All tables of a result, with what was measured, where and by what."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    commits = ", ".join(dict.fromkeys(cell["commit"] for cell in result["cells"]))
    rates, judges = rate_table(result), "validation" if any(VALIDATION in cell for cell in result["cells"]) else "test"
    ranges, masks, task = range_table(result), mask_table(result), result["settings"].get("task", "classify")
    parts = [
        f"# {result['title']}",
        f"Made by `{result['command']}`, cells at commit {commits}, on {result['device']}, one thread per cell; {versions}.",
        f"{SCORES[task]} in %: mean and deviation over the seeds. nan@k: the loss went non-finite at step k.",
        accuracy_table(result),
        *(
            [f"The same at the learning rate that is each method's best on the {judges} images.", rates]
            if rates
            else []
        ),
        *(["Average precision of masks in %.", masks] if masks else []),
        f"Steps until the first test images give {100 * result['target']:g} %: median over the seeds, - if half of them or "
        "more never get there.",
        steps_table(result),
    ]
    if ranges:
        parts += ["The widest range of neighbouring learning rates at which every seed trains (above chance).", ranges]
    return "\n\n".join(part.strip() for part in parts) + "\n"
