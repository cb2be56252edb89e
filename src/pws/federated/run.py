"""A federated run from recipe to `runs/<name>/`, whose files are those of `pws train`, with a picture of the rounds."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final, Literal

from pws.federated.client import app
from pws.federated.deployment import deploy
from pws.federated.federation import Federation, federation_in
from pws.federated.results import FederatedSummary
from pws.federated.server import serve
from pws.federated.simulation import Simulation
from pws.federated.stored import stored_in
from pws.training.facts import ImageFacts, write_facts
from pws.training.recipe import Recipe
from pws.training.run_folder import SUMMARY, check_goes_on, claimed, take_up

Engine = Literal["simulation", "deployment"]
CLIENTS: Final = 10
"""Of a recipe that does not say how many."""


def federate(
    recipe: Recipe, folder: Path, *, engine: Engine = "simulation", resume: bool = False, quiet: bool = False
) -> FederatedSummary:
    """Train `recipe` on clients that keep their images, and leave everything in `folder`.

    Args:
        recipe: what to train; its `federated` part says how. 10 clients if it names no number.
        folder: the run's folder; must not exist unless `resume`.
        engine: simulation asks one client after the other in this process. deployment starts Flower's server and a process per
            client on this machine, which talk over its network; its numbers are the same up to rounding.
        resume: go on behind the last round that is stored, to the result of an uninterrupted run.
        quiet: print nothing.

    Raises:
        PwsError: the recipe asks for something that does not exist or fit, or the folder exists.
        NobodyLeftError: no client of a round has sent weights that can be averaged.
    """
    if not recipe.federated.wanted:
        recipe = replace(recipe, federated=replace(recipe.federated, clients=CLIENTS))
    with claimed(folder, recipe, resume=resume):
        federation_in.cache_clear()
        if resume:
            check_goes_on(folder, recipe)
            for note in stored_in(folder, federation_in(folder)).notes:
                print(f"pws: {note}", file=sys.stderr)
            take_up(folder, recipe)
            federation_in.cache_clear()  # the recipe's settings of the machine may be others now
        federation = federation_in(folder)
        write_facts(folder, ImageFacts.of(federation.data))
        say = _silent if quiet else partial(print, flush=True)
        say(_headline(federation, folder, resume=resume))
        if engine == "deployment":
            deploy(len(federation.shares), folder, say)
        else:
            serve(Simulation(app, len(federation.shares), {"folder": str(folder)}), folder, say)
        return FederatedSummary(**json.loads((folder / SUMMARY).read_bytes()))


def _silent(_: str) -> None:
    return


def _headline(federation: Federation, folder: Path, *, resume: bool) -> str:
    recipe, config = federation.recipe, federation.recipe.federated
    sizes = [len(share) for share in federation.shares]
    parameters = sum(p.numel() for p in federation.module.model.parameters())
    skew = "" if config.alpha is None else f", alpha {config.alpha:g}"
    return (
        f"{'resuming' if resume else 'federating'} {recipe.model.name} with {recipe.model.method} ({parameters:,} parameters) "
        f"on {recipe.data.name}: {len(sizes)} clients with {min(sizes):,} to {max(sizes):,} images{skew}, {config.rounds} "
        f"rounds of {config.per_round} clients, {config.strategy} -> {folder}"
    )
