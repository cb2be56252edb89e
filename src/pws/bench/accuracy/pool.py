"""Cells in parallel processes, each stored when it is done."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pws.bench.accuracy.cell import train_cell
from pws.bench.accuracy.grid import Cell, Grid
from pws.bench.result import read_result, write_result
from pws.training.quiet import quiet_lightning

Stored = dict[str, Any]
"""A cell's row, column, seed, settings and outcome, as in the file."""
Listener = Callable[[Mapping[tuple[str, str, int], Stored]], None]


def run_grid(grid: Grid, path: Path, command: str, jobs: int, listen: Listener) -> Stored:
    """Train what `path` does not hold yet; returns the content of `path`.

    Args:
        grid: the cells.
        path: the result file. Cells in it whose settings are the grid's are kept; others are trained again.
        command: what the file says that made it.
        jobs: processes, of one thread each.
        listen: called with the cells done, at the start and after each.
    """
    done = _stored(grid, path)
    listen(done)
    waiting = [cell for cell in grid.cells if cell.key not in done]
    # Spawned: a forked process would inherit torch's thread pool in an unknown state.
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=quiet_lightning)
    try:
        futures = {pool.submit(train_cell, c, grid.evaluations, grid.evaluation_images): c for c in waiting}
        for future in as_completed(futures):
            cell = futures[future]
            done[cell.key] = {**_head(cell), **asdict(future.result())}
            _write(grid, path, command, done)
            listen(done)
    finally:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:  # after Ctrl-C or an error nobody waits for what they were at
            process.terminate()
    return _write(grid, path, command, done)


def _head(cell: Cell) -> Stored:
    return {"row": cell.row, "column": cell.column, "seed": cell.recipe.seed, "settings": dict(cell.settings)}


def _stored(grid: Grid, path: Path) -> dict[tuple[str, str, int], Stored]:
    cells = (read_result(path, "cells") or {"cells": []})["cells"]
    found = {(cell["row"], cell["column"], cell["seed"]): cell for cell in cells}
    return {c.key: found[c.key] for c in grid.cells if found.get(c.key, {}).get("settings") == dict(c.settings)}


def _write(grid: Grid, path: Path, command: str, done: Mapping[tuple[str, str, int], Stored]) -> Stored:
    """Replaced at once, so that an interruption leaves the old file or the new one."""
    content = {
        **{"grid": grid.name, "title": grid.title, "target": grid.target},
        **{"rows": grid.rows, "columns": grid.columns},
        "cells": [done[cell.key] for cell in grid.cells if cell.key in done],
    }
    partial = path.with_suffix(".partial")
    write_result(partial, command, content)
    partial.replace(path)
    result: Stored = json.loads(path.read_text())
    return result
