"""The cells of a grid side by side, each stored when it is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pws._errors import PwsError, reason_of
from pws.bench.cell import train_cell
from pws.bench.cell_result import CellResult
from pws.bench.grid import Cell, Grid
from pws.bench.grid_tables import MASK_AP, VALIDATION, StoredCell, settings_of
from pws.bench.launcher import Launcher
from pws.bench.processes import Failure, each_apart
from pws.bench.result_file import Result, read_result, write_result
from pws.training.quiet import quiet_lightning

Stored = dict[str, Any]
"""The fields of `StoredCell` and the commit, as in the file."""
Key = tuple[str, str, int]
"""Row, column and seed."""


def run_grid(
    grid: Grid,
    path: Path,
    command: str,
    jobs: int,
    listen: Callable[[Mapping[Key, Stored]], None],
    fail: Callable[[Key, str], None],
    train: Callable[[Cell, int, int], CellResult] = train_cell,
    launcher: Launcher | None = None,
) -> Result | None:
    """Train what `path` does not hold yet; returns the content of `path`, None if there is none.

    Args:
        grid: the cells.
        path: the result file. Cells in it with the settings and the target of the grid are kept; others are trained again.
        command: what the file says that made it.
        jobs: cells at a time, each on one thread.
        listen: called with the cells done, at the start and after each.
        fail: called with a cell that has no result and the reason, such as that its process died; the others go on.
        train: trains a cell, given the number of evaluations and of their images.
        launcher: makes a job of each cell; None trains them in processes of this one.

    Raises:
        PwsError: the file holds something else, or a cell's data or model can't be had.
    """
    done = _stored(grid, path)
    listen(done)
    waiting = {cell.key: cell for cell in grid.cells if cell.key not in done}
    tasks = {key: (cell, grid.evaluations, grid.evaluation_images) for key, cell in waiting.items()}
    each = each_apart if launcher is None else launcher.each
    for key, result in each(train, tasks, jobs, quiet_lightning):
        if isinstance(result, Failure):
            fail(key, result.reason)
            continue
        done[key] = stored_cell(waiting[key], result, grid.target)
        _write(grid, path, command, done)
        listen(done)
    return _write(grid, path, command, done) if done else None


def stored_cell(cell: Cell, result: CellResult, target: float) -> Stored:
    """What is kept of a cell: its place, its accuracy, where it broke and when it reached the target."""
    more = {MASK_AP: result.metrics.get(MASK_AP), VALIDATION: result.validation}
    return {
        **{"row": cell.row, "column": cell.column, "seed": cell.recipe.seed},
        "accuracy": None if result.accuracy is None else round(result.accuracy, 10),
        "non_finite_step": result.non_finite_step,
        "steps_to_target": next((step for step, accuracy in result.curve if accuracy >= target), None),
        "commit": result.commit,
        **{name: round(value, 10) for name, value in more.items() if value is not None},
    }


def _stored(grid: Grid, path: Path) -> dict[Key, Stored]:
    result = read_result(path, "cells", list, StoredCell)
    if result is None or result.get("target") != grid.target:
        return {}
    try:
        found = {(c["row"], c["column"], c["seed"]): (c, settings_of(result, c)) for c in result["cells"]}
    except (LookupError, TypeError) as error:
        raise PwsError(f"{path} is damaged ({reason_of(error)}). Move it away.") from error
    return {c.key: found[c.key][0] for c in grid.cells if c.key in found and found[c.key][1] == c.settings}


def _write(grid: Grid, path: Path, command: str, done: Mapping[Key, Stored]) -> Result:
    content = {
        **{"grid": grid.name, "title": grid.title, "target": grid.target},
        **{"settings": grid.settings, "columns": grid.columns, "rows": grid.rows},
        "cells": [done[cell.key] for cell in grid.cells if cell.key in done],
    }
    return write_result(path, command, content)
