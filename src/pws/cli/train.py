"""`pws train`: a recipe to a run folder."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from pws._errors import PwsError
from pws.cli.arguments import add_run, given_run
from pws.diagnosis import CollapseWarning
from pws.training.agreement import one_voice
from pws.training.callbacks import is_first_process
from pws.training.module import NonFiniteLossError
from pws.training.quiet import quiet_lightning
from pws.training.recipe_file import recipe_parser, shipped_recipes
from pws.training.run import train
from pws.training.summary import Summary

USAGE = "pws train RECIPE [--resume] [--monitor [STEPS]] [--runs DIR] [--PART.KEY VALUE ...]"


@one_voice()
def run(arguments: list[str]) -> int:
    """Parse, train, print how it ended."""
    parser = recipe_parser(
        USAGE,
        "Train a recipe into runs/NAME. RECIPE is a YAML file, a run's folder, or a shipped recipe: "
        f"{', '.join(path.stem for path in shipped_recipes())}.",
        "Example: pws train fashion-mnist-allconv-pws --optim.lr 0.5 --trainer.epochs 2 --name fast. "
        "Exit codes: 0 done, 2 bad input, 3 the loss went non-finite.",
    )
    add_run(parser, "go on with the run from the end of its last whole epoch")
    parser.add_argument(
        "--monitor",
        type=int,
        nargs="?",
        const=50,
        default=None,
        help="diagnose the network every STEPS steps (50 if no number is given), and write diagnosis.html to the run's folder",
    )
    given = given_run(parser, arguments)
    if given is None:
        return 0
    recipe, folder, parsed = given
    if recipe.federated.wanted:
        raise PwsError(
            f"federated.clients ({recipe.federated.clients}) divides the images among clients, which `pws federate` trains. "
            "Use that command, or leave federated out."
        )
    quiet_lightning()
    warnings.filterwarnings("ignore", category=CollapseWarning)  # the closing message says the same
    try:
        summary = train(recipe, folder, resume=parsed.resume, monitor=parsed.monitor)
    except NonFiniteLossError as error:
        if is_first_process():
            print(f"pws: {error}", file=sys.stderr)
            return 3
        return 0  # the launcher kills the first process, and its message, when another one ends with a code
    if is_first_process():
        print(_closing(summary, folder))
        if summary.verdict is not None:
            print(f"{folder}/diagnosis.html: {summary.verdict}")
    return 0


def _closing(summary: Summary, folder: Path) -> str:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f} %"

    words = summary.score.replace("_ap", " AP")
    of = (
        "last epoch" if summary.best is None else f"{summary.checkpoint} checkpoint, validation {percent(summary.best)}"
    )
    return (
        f"test {words} {percent(summary.metrics.get(summary.score))} ({of}), {summary.steps} steps in "
        f"{summary.train_seconds:.0f} s, {summary.images_per_second:.0f} images/s, {summary.peak_memory_mb:.0f} MB\n"
        f"{folder}/: summary.json, recipe.yaml, metrics.csv, tensorboard/, checkpoints/   (pws evaluate {folder})"
    )
