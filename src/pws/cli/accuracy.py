"""`pws bench accuracy`: methods side by side, a grid of cells in parallel processes."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from pws.bench.accuracy import Grid, load_grid, run_grid, shipped_grids
from pws.bench.accuracy.report import write_report
from pws.bench.accuracy.table import summarize
from pws.cli.arguments import check_failures, check_folder, check_jobs, command_parser, parse

Done = Mapping[tuple[str, str, int], dict[str, Any]]


def run(arguments: list[str]) -> int:
    """Parse, train what is missing, write the tables and pictures."""
    parser = command_parser(
        "bench accuracy",
        "Train a grid of methods, learning rates, batch sizes and seeds, each cell on one thread, and write NAME.json, NAME.md "
        "and pictures. Every cell is stored when it is done: the same command goes on where it was interrupted. Shipped "
        f"grids, each less than an hour on two cores: {', '.join(shipped_grids())}.",
        "pws bench accuracy collapse --jobs 2",
    )
    parser.add_argument(
        "grid", type=str, help="a shipped grid, or a YAML file with title, settings, columns, rows, seeds"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cells trained at a time; all cores")
    parser.add_argument("--out", type=str, help="folder of the files; benchmarks/accuracy, or benchmarks/quick")
    parser.add_argument(
        "--quick", action="store_true", help="digits and a few steps: to see that it works, not to measure"
    )
    parsed = parse(parser, arguments)
    check_jobs(parsed.jobs)
    grid = load_grid(parsed.grid, quick=parsed.quick)
    out = Path(parsed.out or ("benchmarks/quick" if parsed.quick else "benchmarks/accuracy"))
    check_folder(out)
    console = Console()
    console.print(grid.title, highlight=False)
    command = f"pws bench accuracy {parsed.grid}{' --quick' if parsed.quick else ''}"
    with _Progress(grid, parsed.jobs, console) as progress:
        result = run_grid(grid, out / f"{grid.name}.json", command, parsed.jobs, progress, progress.fail)
    if result is not None:
        files = write_report(result, out / grid.name)
        console.print(f"Files: {out / grid.name}.json, {', '.join(map(str, files))}", highlight=False, soft_wrap=True)
    check_failures("cells", progress.failures, len(grid.cells))
    return 0


class _Progress:
    """A live table on a terminal, a line a cell elsewhere; both with the time left."""

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
        """Take note of a cell without an outcome."""
        name = f"{key[0]}, {key[1]}, seed {key[2]}"
        self.failures[name] = reason
        self.console.print(f"{name}: {reason}", highlight=False, markup=False, soft_wrap=True)

    def _line(self, cell: dict[str, Any]) -> None:
        ended = f"nan@{cell['non_finite_step']}" if cell["accuracy"] is None else f"{100 * cell['accuracy']:.2f} %"
        self.console.print(
            f"{len(self.done)}/{len(self.grid.cells)}  {cell['row']}, {cell['column']}, seed {cell['seed']}: {ended}, "
            f"{cell['seconds']:.0f} s; {self._left()}",
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
        result = {"cells": list(self.done.values()), "target": self.grid.target}
        summaries = summarize(result)
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
