"""`pws federate`: a recipe trained on clients that keep their images, to a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pws.cli.arguments import add_run, given_run
from pws.training.quiet import quiet_lightning
from pws.training.recipe_file import recipe_parser, shipped_recipes

if TYPE_CHECKING:
    from pws.federated import FederatedSummary

USAGE = (
    "pws federate RECIPE [--resume] [--engine ENGINE] [--runs DIR] [--federated.KEY VALUE ...] [--PART.KEY VALUE ...]"
)


def run(arguments: list[str]) -> int:
    """Parse, train, print how it ended."""
    parser = recipe_parser(
        USAGE,
        "Train a recipe on clients that keep their images, with Flower, into runs/NAME: a server averages what the clients "
        f"make of its weights. RECIPE is a YAML file, a run's folder, or a shipped recipe: "
        f"{', '.join(path.stem for path in shipped_recipes())}.",
        "Example: pws federate fashion-mnist-allconv-pws --federated.clients 10 --federated.alpha 0.1 --federated.rounds 30. "
        "Exit codes: 0 done, 2 bad input, or no client could be averaged.",
    )
    add_run(parser, "go on with the run behind its last whole round")
    parser.add_argument(
        "--engine",
        type=Literal["simulation", "deployment"],
        default="simulation",
        help="simulation: clients one after the other in this process; deployment: Flower's server and a process per client "
        "on this machine, with the same numbers",
    )
    given = given_run(parser, arguments)
    if given is None:
        return 0
    recipe, folder, parsed = given
    from pws.federated import federate

    quiet_lightning()
    print(_closing(federate(recipe, folder, engine=parsed.engine, resume=parsed.resume), folder))
    return 0


def _closing(summary: FederatedSummary, folder: Path) -> str:
    of = "last round" if summary.best is None else f"round {summary.best_round}, validation {100 * summary.best:.2f} %"
    left_out = f"; replies left out of clients {', '.join(summary.left_out)}" if summary.left_out else ""
    return (
        f"test accuracy {100 * summary.metrics['accuracy']:.2f} % ({of}), {summary.rounds} rounds in {summary.seconds:.0f} s"
        f"{left_out}\n{folder}/: summary.json, recipe.yaml, metrics.csv, rounds.png, checkpoints/   (pws evaluate {folder})"
    )
