"""`python -m benchmarks convert`: conversion of real models, checked."""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import RESULTS
from benchmarks.convert.matrix import ALL, run_conversions
from benchmarks.convert.tables import conversions_table
from benchmarks.experiment import PROGRAM
from pws._errors import PwsError, shown
from pws._files import write_whole
from pws.cli.arguments import check_folder, check_jobs, command_parser, parse


def run(arguments: list[str]) -> int:
    """Parse, check the models, write the table."""
    parser = command_parser(
        "convert",
        f"Convert {len(ALL)} models of torchvision and timm, and check of each that its layers keep their classes, that no "
        "norm is left which the plan does not list, that outputs are finite, that five steps at learning rate 0.1 are, that "
        "the fold and copies are equal; of a detector that its loss falls over twenty steps, that it is evaluated and "
        "diagnosed. Each model is stored when it is done: the same command goes on where it was "
        "interrupted, and other models stay in the files.",
        f"{PROGRAM} convert --only 'timm:resnet*'",
        PROGRAM,
    )
    parser.add_argument("--only", type=str, default="*", help="pattern of the models' names")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="models at a time; all cores")
    parser.add_argument("--out", type=str, default=str(RESULTS), help="folder of convert.json and convert.md")
    parsed = parse(parser, arguments)
    specs = [spec for spec in ALL if fnmatchcase(spec, parsed.only)]
    check_jobs(parsed.jobs)
    if not specs:
        raise PwsError(f"--only must match a model; got {shown(parsed.only)}. Models are such as {ALL[0]}.")
    check_folder(Path(parsed.out))
    console, path = Console(), Path(parsed.out) / "convert.json"

    def line(spec: str, model: dict[str, Any], done: int) -> None:
        outcome = "; ".join(model["failures"]) or model["not_run"] or "passed"
        console.print(f"{done}/{len(specs)}  {spec}: {outcome}", highlight=False, markup=False, soft_wrap=True)

    command = f"{PROGRAM} convert"
    result = run_conversions(specs, path, command, parsed.jobs, line)
    table = path.with_suffix(".md")
    share = f"{result['passed']} of {result['run']} models passed all checks"
    write_whole(table, f"# Conversion of real models\n\n{share} (`{command}`).\n\n{conversions_table(result)}")
    console.print(f"{share}. Files: {path}, {table}", highlight=False, soft_wrap=True)
    return 0
