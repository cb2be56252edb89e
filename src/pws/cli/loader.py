"""`pws bench loader`: whether a recipe's loader keeps up with its network."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from pws._errors import PwsError
from pws.bench.loader_speed import LoaderSpeed, measure_loader
from pws.bench.result_file import write_result
from pws.cli.arguments import add_force, check_free, check_word, given_recipe
from pws.training.quiet import quiet_lightning
from pws.training.recipe_file import recipe_parser

USAGE: Final = "pws bench loader RECIPE [--seconds S] [--out DIR] [--force] [--PART.KEY VALUE ...]"
LONGEST: Final = 3600


def run(arguments: list[str]) -> int:
    """Parse, time, print, write."""
    parser = recipe_parser(
        USAGE,
        "Time the loader of a recipe alone, over an epoch at most, and the training steps of its network on one batch: images "
        "per second of both. RECIPE is a YAML file, a run's folder, or a shipped recipe.",
        "Example: pws bench loader imagenet-resnet50-pws --data.name stream --data.root data/shards --data.workers 8",
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing, for each of the two at most")
    parser.add_argument("--out", type=str, help="folder of loader.json, which holds the numbers")
    add_force(parser)
    given = given_recipe(parser, arguments)
    if given is None:
        return 0
    recipe, parsed = given
    check_word("--out", parsed.out)
    if not 0 < parsed.seconds <= LONGEST:
        raise PwsError(f"--seconds must be positive, and at most {LONGEST}; got {parsed.seconds}.")
    path = None if parsed.out is None else Path(parsed.out) / "loader.json"
    if path is not None:
        check_free(path, force=parsed.force)
    quiet_lightning()
    with Console(stderr=True).status("timing"):
        speed = measure_loader(recipe, parsed.seconds)
    console = Console()
    console.print(_table(recipe.name, speed))
    if path is not None:
        write_result(path, " ".join(["pws bench loader", *arguments]), {"recipe": recipe.name, **asdict(speed)})
        console.print(f"Files: {path}", highlight=False, soft_wrap=True)
    return 0


def _table(name: str, speed: LoaderSpeed) -> Table:
    table = Table(title=f"{name}, batch {speed.batch}", title_justify="left", caption_justify="left")
    table.caption = (
        f"loader: {speed.loaded:,} images. model: the median of {speed.steps} training steps on one batch. "
        + ("The loader keeps up." if speed.ratio >= 1 else "The model waits for images: raise --data.workers.")
    )
    for column in ("", "images/s", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row(f"loader, {speed.workers} workers", f"{speed.loader:,.0f}", f"{speed.ratio:.2f}")
    table.add_row("model", f"{speed.model:,.0f}", "1")
    return table
