"""The command of an experiment, which takes nothing but where to write: NAME.json and NAME.png."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from rich.console import Console

from benchmarks import QUICK, RESULTS
from pws._errors import PwsError
from pws.bench.result_file import content_of
from pws.cli.arguments import check_folder, command_parser, parse
from pws.training.quiet import quiet_lightning

PROGRAM: Final = "python -m benchmarks"
Say = Callable[[str], None]
Measure = Callable[[Path, bool, Say], object]
"""Measures, quickly or not, and writes into the folder; says what it found."""


def run_experiment(name: str, line: str, measure: Measure, arguments: list[str]) -> int:
    """Parse, measure, write; returns the exit code."""
    parser = command_parser(name, f"{line} Writes {name}.json and {name}.png.", f"{PROGRAM} {name}", PROGRAM)
    parser.add_argument("--out", type=str, help="folder of the two files; benchmarks/results if left out")
    parser.add_argument(
        "--quick", action="store_true", help="digits and few steps: to see that it works, not to measure"
    )
    parsed = parse(parser, arguments)
    quiet_lightning()
    console, out = Console(), Path(parsed.out or (QUICK if parsed.quick else RESULTS))
    check_folder(out)
    check_own(out / f"{name}.json", f"{PROGRAM} {name}")
    measure(out, parsed.quick, lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True))
    console.print(f"Files: {out / name}.json, {out / name}.png", highlight=False, soft_wrap=True)
    return 0


def check_own(path: Path, command: str) -> None:
    """Raise `PwsError` if there is a file at `path` that this command has not made: its own result is measured anew."""
    found = content_of(path) if path.exists() else {"command": command}
    if not isinstance(found, dict) or found.get("command") != command:
        raise PwsError(f"{path} exists already, and is no result of `{command}`. Choose another folder with --out.")
