"""`pws evaluate`: a run's checkpoint on the test images."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pws.cli.arguments import command_parser, parse
from pws.training._evaluate import Evaluation, evaluate
from pws.training.module import NonFiniteLossError
from pws.training.quiet import quiet_lightning


def run(arguments: list[str]) -> int:
    """Parse, evaluate, print."""
    parser = command_parser(
        "evaluate",
        "Evaluate a run's checkpoint on the test images: top-1 and top-5 accuracy, loss, and accuracy by class.",
        "pws evaluate runs/fashion-mnist-allconv-pws --checkpoint last --json",
    )
    parser.add_argument("run", type=str, help="the run's folder")
    parser.add_argument("--checkpoint", type=str, default="best", help="best, last, or the path of a checkpoint")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parsed = parse(parser, arguments)
    quiet_lightning()
    try:
        evaluation = evaluate(Path(parsed.run), parsed.checkpoint)
    except NonFiniteLossError as error:
        print(f"pws: {error}", file=sys.stderr)
        return 3
    if parsed.json:
        print(json.dumps(asdict(evaluation), indent=2))
    else:
        _print(evaluation)
    return 0


def _print(evaluation: Evaluation) -> None:
    console = Console()
    console.print(evaluation.checkpoint, highlight=False, soft_wrap=True)
    total = Table()
    for column in ("images", "top-1", "top-5", "loss"):
        total.add_column(column, justify="right")
    total.add_row(
        f"{evaluation.images:,}",
        f"{100 * evaluation.accuracy:.2f} %",
        f"{100 * evaluation.top5:.2f} %",
        f"{evaluation.loss:.4f}",
    )
    classes = Table()
    classes.add_column("class")
    classes.add_column("accuracy", justify="right")
    for name, accuracy in evaluation.per_class.items():
        classes.add_row(name, f"{100 * accuracy:.2f} %")
    console.print(total, classes)
