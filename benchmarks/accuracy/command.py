"""`python -m benchmarks accuracy`: the grids behind the documentation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from benchmarks import QUICK, RESULTS
from benchmarks.accuracy.rules import rules_grid, train_by_rule
from benchmarks.accuracy.shipped import GRIDS, shipped_grid
from benchmarks.experiment import PROGRAM
from pws.bench.cell import train_cell
from pws.bench.grid import Grid
from pws.cli.accuracy import train_grid
from pws.cli.arguments import command_parser, parse
from pws.cli.launching import add_launching, launching

RULES: Final = "rules"
"""The grid that no YAML file can hold."""
QUICK_STEPS: Final = 4
QUICK_END: Final = {"trainer.max_steps": QUICK_STEPS, "trainer.epochs": 1}
QUICK_ROUNDS: Final = {"federated.rounds": 2, "federated.clients": 2, "federated.alpha": None}


def run(arguments: list[str]) -> int:
    """Parse, train what is missing, write the tables and pictures."""
    parser = command_parser(
        "accuracy",
        "Train a grid of methods, learning rates, batch sizes and seeds, each cell on one thread, and write NAME.json, NAME.md "
        f"and two pictures. The grids: {', '.join([*GRIDS, RULES])}.",
        f"{PROGRAM} accuracy collapse --jobs 2",
        PROGRAM,
    )
    parser.add_argument("grid", type=str, help="one of them")
    add_launching(parser)
    parser.add_argument("--out", type=str, help="folder of the files; benchmarks/results/accuracy if left out")
    parser.add_argument(
        "--quick", action="store_true", help="digits and a few steps: to see that it works, not to measure"
    )
    parsed = parse(parser, arguments)
    by_rule = parsed.grid == RULES
    grid = rules_grid() if by_rule else shipped_grid(parsed.grid)
    out = Path(parsed.out or (QUICK if parsed.quick else RESULTS / "accuracy"))
    command = f"{PROGRAM} accuracy {parsed.grid}{' --quick' if parsed.quick else ''}"
    train = train_by_rule if by_rule else train_cell
    grid = quick(grid) if parsed.quick else grid
    jobs, launcher = launching(parsed, len(grid.cells), out)
    return train_grid(grid, out, jobs, command, train, launcher)


def quick(grid: Grid) -> Grid:
    """The first and the last column and one seed of `grid`, on digits, with narrow networks and a few steps, no backbone."""
    names = list(grid.columns)
    columns = {name: _smaller(grid, grid.columns[name]) for name in names[:: max(1, len(names) - 1)]}
    return replace(
        grid,
        title=f"quick look, not a measurement: digits, {QUICK_STEPS} steps",
        columns=columns,
        rows={row: {k: v for k, v in own.items() if k != "model.backbone"} for row, own in grid.rows.items()},
        seeds={row: seeds[:1] for row, seeds in grid.seeds.items()},
        evaluations=2,
    )


def _smaller(grid: Grid, column: Any) -> dict[str, Any]:
    batch_size = {"data.batch_size": 128, **grid.settings, **column}["data.batch_size"]
    if grid.settings.get("task") == "detect":
        data = {"data.name": "digit-scenes", "data.image_size": 64, "data.train_images": 16}
        return {**column, **data, **QUICK_END}
    return {
        **column,
        **{"data.name": "digits", "data.image_size": 16, "data.train_images": 128},
        **{"data.batch_size": min(batch_size, 32), "model.width": 0.125},
        **(QUICK_ROUNDS if "federated.clients" in {**grid.settings, **column} else QUICK_END),
    }
