"""Cells in parallel processes, each stored when it is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pws.bench.accuracy.cell import train_cell
from pws.bench.accuracy.grid import Cell, Grid
from pws.bench.accuracy.table import StoredCell
from pws.bench.apart import Failure, each_apart
from pws.bench.result import read_result, write_result
from pws.training.quiet import quiet_lightning

Stored = dict[str, Any]
"""A cell's row, column, seed, settings and outcome, as in the file."""
Key = tuple[str, str, int]


def run_grid(
    grid: Grid,
    path: Path,
    command: str,
    jobs: int,
    listen: Callable[[Mapping[Key, Stored]], None],
    fail: Callable[[Key, str], None],
) -> Stored | None:
    """Train what `path` does not hold yet; returns the content of `path`, None if there is none.

    Args:
        grid: the cells.
        path: the result file. Cells in it whose settings are the grid's are kept; others are trained again.
        command: what the file says that made it.
        jobs: processes, of one thread each.
        listen: called with the cells done, at the start and after each.
        fail: called with a cell that has no outcome and the reason, such as that its process died; the others go on.

    Raises:
        PwsError: the file holds something else, or a cell's data or model can't be had.
    """
    done = _stored(grid, path)
    listen(done)
    waiting = {cell.key: cell for cell in grid.cells if cell.key not in done}
    tasks = {key: (cell, grid.evaluations, grid.evaluation_images) for key, cell in waiting.items()}
    for key, outcome in each_apart(train_cell, tasks, jobs, quiet_lightning):
        if isinstance(outcome, Failure):
            fail(key, outcome.reason)
            continue
        done[key] = {**_head(waiting[key]), **asdict(outcome)}
        _write(grid, path, command, done)
        listen(done)
    return _write(grid, path, command, done) if done else None


def _head(cell: Cell) -> Stored:
    return {"row": cell.row, "column": cell.column, "seed": cell.recipe.seed, "settings": dict(cell.settings)}


def _stored(grid: Grid, path: Path) -> dict[Key, Stored]:
    cells = (read_result(path, "cells", list, StoredCell) or {"cells": []})["cells"]
    found = {(cell["row"], cell["column"], cell["seed"]): cell for cell in cells}
    return {c.key: found[c.key] for c in grid.cells if found.get(c.key, {}).get("settings") == dict(c.settings)}


def _write(grid: Grid, path: Path, command: str, done: Mapping[Key, Stored]) -> Stored:
    content = {
        **{"grid": grid.name, "title": grid.title, "target": grid.target},
        **{"rows": grid.rows, "columns": grid.columns},
        "cells": [done[cell.key] for cell in grid.cells if cell.key in done],
    }
    return write_result(path, command, content)
