"""`pws bench accuracy`: methods side by side, a grid of cells in parallel processes or jobs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from pws.bench.cell import train_cell
from pws.bench.cell_result import CellResult
from pws.bench.grid import Cell, Grid, load_grid
from pws.bench.grid_report import write_grid_report
from pws.bench.grid_tables import over_seeds
from pws.bench.launcher import Launcher
from pws.bench.pool import run_grid
from pws.cli.arguments import check_failures, check_folder, command_parser, parse
from pws.cli.launching import add_launching, launching

Done = Mapping[tuple[str, str, int], dict[str, Any]]


def run(arguments: list[str]) -> int:
    """Parse, train what is missing, write the tables and pictures."""
    parser = command_parser(
        "bench accuracy",
        "Train a grid of methods, learning rates, batch sizes and seeds, each cell on one thread, and write NAME.json, NAME.md "
        "and two pictures. Every cell is stored when it is done: the same command goes on where it was interrupted.",
        "pws bench accuracy grid.yaml --jobs 2",
    )
    parser.add_argument("grid", type=str, help="a YAML file with title, settings, columns, rows, seeds")
    add_launching(parser)
    parser.add_argument("--out", type=str, default="bench", help="folder of the files")
    parsed = parse(parser, arguments)
    grid = load_grid(Path(parsed.grid))
    out = Path(parsed.out)
    jobs, launcher = launching(parsed, len(grid.cells), out)
    return train_grid(grid, out, jobs, f"pws bench accuracy {parsed.grid}", launcher=launcher)


def train_grid(
    grid: Grid,
    out: Path,
    jobs: int,
    command: str,
    train: Callable[[Cell, int, int], CellResult] = train_cell,
    launcher: Launcher | None = None,
) -> int:
    """Train what `out` does not hold yet, show how it goes, write the tables and pictures; returns the exit code."""
    check_folder(out)
    console = Console()
    console.print(grid.title, highlight=False)
    path = out / f"{grid.name}.json"
    with _Progress(grid, jobs, console) as progress:
        result = run_grid(grid, path, command, jobs, progress, progress.fail, train, launcher)
    if result is not None:
        files = write_grid_report(result, out / grid.name)
        console.print(f"Files: {path}, {', '.join(map(str, files))}", highlight=False, soft_wrap=True)
    check_failures("cells", progress.failures, len(grid.cells))
    return 0


class _Progress:
    """A live table on a terminal, a line per cell elsewhere; both with the time left."""

    def __init__(self, grid: Grid, jobs: int, console: Console) -> None:
        self.grid, self.jobs, self.console = grid, jobs, console
        self.done: Done = {}
        self.failures: dict[str, str] = {}
        self.started = time.perf_counter()
        self.kept: int | None = None
        """Cells that an earlier run has left."""
        self.live = Live(console=console, refresh_per_second=1, get_renderable=self._table)
        self.shown = self.live if console.is_terminal else nullcontext()

    def __enter__(self) -> _Progress:
        self.shown.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self.shown.__exit__(*raised)
        if not self.console.is_terminal:
            self.console.print(self._table())

    def __call__(self, done: Done) -> None:
        """Take note of what is done; the newest comes last."""
        self.done = dict(done)
        if self.kept is None:
            self.kept = len(done)
        elif not self.console.is_terminal:
            self._line(list(done.values())[-1])

    def fail(self, key: tuple[str, str, int], reason: str) -> None:
        """Take note of a cell without a result."""
        name = f"{key[0]}, {key[1]}, seed {key[2]}"
        self.failures[name] = reason
        self.console.print(f"{name}: {reason}", highlight=False, markup=False, soft_wrap=True)

    def _line(self, cell: dict[str, Any]) -> None:
        ended = f"nan@{cell['non_finite_step']}" if cell["accuracy"] is None else f"{100 * cell['accuracy']:.2f} %"
        self.console.print(
            f"{len(self.done)}/{len(self.grid.cells)}  {cell['row']}, {cell['column']}, seed {cell['seed']}: {ended}; "
            f"{self._left()}",
            highlight=False,
            soft_wrap=True,
        )

    def _left(self) -> str:
        new = len(self.done) - (self.kept or 0) + len(self.failures)
        if new < self.jobs:
            return "time left unknown yet"
        seconds = (
            (time.perf_counter() - self.started) / new * (len(self.grid.cells) - len(self.done) - len(self.failures))
        )
        return f"{seconds / 60:.0f} min left" if seconds >= 60 else f"{seconds:.0f} s left"

    def _table(self) -> Table:
        summaries = over_seeds({"cells": list(self.done.values())})
        table = Table(
            caption=f"{len(self.done)} of {len(self.grid.cells)} cells, {self._left()}", caption_justify="left"
        )
        table.add_column("method")
        for column in self.grid.columns:
            table.add_column(column, justify="right")
        for row in self.grid.rows:
            texts = [str(summaries[row, c]) if (row, c) in summaries else "" for c in self.grid.columns]
            table.add_row(row, *texts)
        return table
