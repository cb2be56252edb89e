"""`pws evaluate`: a run's checkpoint on the test images."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pws.cli.arguments import add_force, check_free, command_parser, parse
from pws.training._evaluate import evaluate
from pws.training.module import NonFiniteLossError
from pws.training.quiet import quiet_lightning
from pws.training.results import DetectionEvaluation, Evaluation


def run(arguments: list[str]) -> int:
    """Parse, evaluate, print."""
    parser = command_parser(
        "evaluate",
        "Evaluate a run's checkpoint on the test images. A classifier: top-1 and top-5 accuracy, loss, and accuracy by class. "
        "A detector: COCO's twelve figures of boxes and masks, Pascal VOC's average precision at an overlap of 0.5, and a row "
        "per class.",
        "pws evaluate runs/fashion-mnist-allconv-pws --checkpoint last --json",
    )
    parser.add_argument("run", type=str, help="the run's folder")
    parser.add_argument("--checkpoint", type=str, default="best", help="best, last, or the path of a checkpoint")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--sheet",
        type=str,
        metavar="FILE.png",
        help="write a sheet of the 24 worst test images: of a classifier those with the largest loss, of a detector those with "
        "the lowest F1, with what is there and what was found",
    )
    add_force(parser)
    parsed = parse(parser, arguments)
    sheet = Path(parsed.sheet) if parsed.sheet else None
    if sheet is not None:
        check_free(sheet, force=parsed.force)
    quiet_lightning()
    try:
        evaluation = evaluate(Path(parsed.run), parsed.checkpoint, sheet)
    except NonFiniteLossError as error:
        print(f"pws: {error}", file=sys.stderr)
        return 3
    if parsed.json:
        print(json.dumps(asdict(evaluation), indent=2))
    else:
        _print(evaluation, sheet)
    return 0


def _print(evaluation: Evaluation | DetectionEvaluation, sheet: Path | None) -> None:
    console = Console()
    console.print(evaluation.checkpoint, highlight=False, soft_wrap=True)
    console.print(*(_detection(evaluation) if isinstance(evaluation, DetectionEvaluation) else _classes(evaluation)))
    if sheet is not None:
        console.print(f"the worst images: {sheet}", highlight=False, soft_wrap=True)


def _table(first: str, *columns: str) -> Table:
    table = Table()
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _classes(evaluation: Evaluation) -> tuple[Table, Table]:
    total = Table()
    for column in ("images", "top-1", "top-5", "loss"):
        total.add_column(column, justify="right")
    total.add_row(
        f"{evaluation.images:,}",
        f"{100 * evaluation.accuracy:.2f} %",
        f"{100 * evaluation.top5:.2f} %",
        f"{evaluation.loss:.4f}",
    )
    classes = _table("class", "accuracy")
    for name, accuracy in evaluation.per_class.items():
        classes.add_row(name, f"{100 * accuracy:.2f} %")
    return total, classes


MEANING = {
    **{"ap": "AP", "ap50": "AP, overlap 0.5", "ap75": "AP, overlap 0.75"},
    **{f"ap_{size}": f"AP, {size} objects" for size in ("small", "medium", "large")},
    **{f"ar{count}": f"AR, {count} per image" for count in (1, 10, 100)},
    **{f"ar_{size}": f"AR, {size} objects" for size in ("small", "medium", "large")},
}
"""Of COCO's twelve figures."""


def _detection(evaluation: DetectionEvaluation) -> tuple[Table, Table]:
    kinds = {"box": evaluation.boxes, **({} if evaluation.masks is None else {"mask": evaluation.masks})}
    total = _table(f"{evaluation.images:,} images", *(f"{kind} (%)" for kind in kinds))
    for name, meaning in MEANING.items():
        total.add_row(meaning, *(_percent(figures[name]) for figures in kinds.values()))
    total.add_section()
    total.add_row("VOC's AP, overlap 0.5", _percent(evaluation.voc_ap50))
    classes = _table("class", *(f"{kind} AP (%)" for kind in kinds), "VOC AP50 (%)")
    for name, found in evaluation.per_class.items():
        classes.add_row(name, *(_percent(found[f"{kind}_ap"]) for kind in kinds), _percent(found["voc_ap50"]))
    return total, classes


def _percent(figure: float | None) -> str:
    """In percent; a dash where no object is that it could be taken of."""
    return "-" if figure is None else f"{100 * figure:.1f}"
