"""How fast a recipe's loader gives images, beside how fast its network takes them."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader

from pws.bench.result_file import rounded
from pws.training.data import RecipeData, check_shares
from pws.training.quiet import bare_trainer, real_interrupts
from pws.training.recipe import Recipe
from pws.training.tasks import data_of, module_of

WARM: Final = 2
"""Steps before those that are timed."""
FEWEST: Final = 3
"""Timed steps at least, whatever the time."""
MOST: Final = 1000


@dataclass(frozen=True)
class LoaderSpeed:
    """Images per second of a loader and of the training steps that take them."""

    loader: float
    model: float
    ratio: float
    """Of the loader to the model: below 1 the model waits."""
    loaded: int
    """Images that the loader was timed on."""
    steps: int
    batch: int
    """Images of a step."""
    workers: int


def measure_loader(recipe: Recipe, seconds: float) -> LoaderSpeed:
    """Time the loader for one epoch and the training steps on one of its batches, each for `seconds` at most, on one device.

    Raises:
        PwsError: the recipe can't be trained.
    """
    batch_size = max(1, recipe.data.batch_size // recipe.trainer.accumulate)
    recipe = replace(
        recipe,
        data=replace(recipe.data, batch_size=batch_size),
        optim=replace(recipe.optim, lr=0.0),  # a step costs the same, and the same batch a thousand times goes nowhere
    )
    data = data_of(recipe)
    check_shares(len(data.splits.train), batch_size, world=1, accumulate=1)
    batch, loaded, loader = _time_loader(data, seconds)
    steps = _time_steps(recipe, data, batch, seconds)
    model = batch_size / statistics.median(steps)
    speeds = rounded(loader), rounded(model), rounded(loader / model)
    return LoaderSpeed(*speeds, loaded, len(steps), batch_size, recipe.data.workers)


def _time_loader(data: RecipeData, seconds: float) -> tuple[Any, int, float]:
    """A batch; how many images came after the first one, which waits for the processes to start, and how many per second.

    An epoch of one batch is timed with that start.
    """
    loader = data.train_dataloader()
    begun = time.perf_counter()
    batches = iter(loader)
    first = next(batches)
    size, count = len(first[0]), 0
    started = now = time.perf_counter()
    for _ in batches:
        count += size
        now = time.perf_counter()
        if now - started > seconds:
            break
    if not count:
        started, count = begun, size
    return first, count, count / (now - started)


class _OneBatch(LightningDataModule):
    """The same batch in each step."""

    def __init__(self, batch: Any, seed: int) -> None:
        super().__init__()
        self.batch, self.seed = batch, seed

    def train_dataloader(self) -> DataLoader[Any]:
        """That of the training."""
        return DataLoader([self.batch] * MOST, batch_size=None)  # type: ignore[arg-type]


class _StopWatch(Callback):
    """The seconds of each step; ends the training when its time is over."""

    def __init__(self, seconds: float) -> None:
        self.limit, self.stamps = seconds, list[float]()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        """Look at the clock, when the device has done the step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.stamps.append(time.perf_counter())
        over = self.stamps[-1] - self.stamps[0] > self.limit
        trainer.should_stop = over and len(self.stamps) >= WARM + FEWEST

    def steps(self) -> list[float]:
        """Of those that follow the warm-up."""
        stamps = self.stamps[WARM - 1 :]
        return [after - before for before, after in pairwise(stamps)]


def _time_steps(recipe: Recipe, data: RecipeData, batch: Any, seconds: float) -> list[float]:
    seed_everything(recipe.seed, workers=True, verbose=False)
    watch, trainer = _StopWatch(seconds), recipe.trainer
    engine = bare_trainer(
        accelerator=trainer.accelerator,
        precision=trainer.precision,
        gradient_clip_val=recipe.optim.clip_norm,
        max_epochs=1,
        callbacks=[watch],
    )
    with real_interrupts():
        engine.fit(module_of(recipe, data), datamodule=_OneBatch(batch, recipe.seed))
    return watch.steps()
