"""One cell of a grid: trained by the same code as `pws train`, its accuracy taken on the way."""

from __future__ import annotations

import math
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from pws.bench.cell_result import CellResult
from pws.bench.federated_cell import federate_cell
from pws.bench.grid import Cell
from pws.bench.result_file import commit
from pws.methods import Method
from pws.training.callbacks import TEST, VALIDATION, Clock, averages, metrics_of
from pws.training.data import RecipeData
from pws.training.module import NonFiniteLossError, TaskModule
from pws.training.quiet import bare_trainer, real_interrupts
from pws.training.tasks import module_of, trained_task


def train_cell(cell: Cell, evaluations: int, evaluation_images: int, method: Method | None = None) -> CellResult:
    """Train the cell on one thread; `method` replaces the recipe's, unless that is federated."""
    torch.set_num_threads(1)
    recipe = cell.recipe
    if recipe.federated.wanted:
        return federate_cell(recipe)
    task = trained_task(recipe)
    data = task.data(recipe.data, recipe.seed)
    seed_everything(recipe.seed, workers=True, verbose=False)
    module = module_of(recipe, data, method, task=task)
    clock, watch = Clock(), _Curve(data, evaluations, evaluation_images)
    trainer = bare_trainer(
        accelerator="cpu",
        max_epochs=-1 if recipe.trainer.max_steps else recipe.trainer.epochs,
        max_steps=recipe.trainer.max_steps or -1,
        check_val_every_n_epoch=None,
        val_check_interval=10**9,
        gradient_clip_val=recipe.optim.clip_norm,
        callbacks=[clock, watch, *averages(recipe.optim)],
    )
    failure: NonFiniteLossError | None = None
    metrics: dict[str, float] = {}
    validation: float | None = None
    try:
        with warnings.catch_warnings(), real_interrupts():
            warnings.simplefilter("ignore")
            trainer.fit(module, datamodule=data)
            clock.stop()
            metrics = metrics_of(TEST, trainer.test(module, datamodule=data, verbose=False)[0])
            if data.splits.validation is not None:
                trainer.validate(module, datamodule=data, verbose=False)
                validation = float(trainer.callback_metrics[VALIDATION + module.SCORE])
    except NonFiniteLossError as error:
        clock.stop()
        failure = error
    last = watch.losses[-max(1, len(watch.losses) // 10) :]
    loss = sum(last) / len(last) if last else math.nan
    return CellResult(
        accuracy=metrics.get(module.SCORE),
        train_loss=round(loss, 4) if math.isfinite(loss) else None,
        non_finite_step=failure.step if failure else None,
        non_finite_layer=failure.layer if failure else None,
        steps=trainer.global_step,
        seconds=round(clock.seconds - watch.seconds, 2),
        commit=commit(),
        validation=validation,
        curve=watch.curve,
        metrics=metrics,
    )


class _Curve(Callback):
    """Keeps the losses, and takes the score on the first images a number of times."""

    def __init__(self, data: RecipeData, evaluations: int, images: int) -> None:
        self.data, self.evaluations, self.images = data, evaluations, images
        self.losses: list[float] = []
        self.curve: list[tuple[int, float]] = []
        self.seconds = 0.0
        """Spent on it."""

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *_: object) -> None:
        self.losses.append(float(outputs["loss"]))
        every = max(1, int(trainer.estimated_stepping_batches) // self.evaluations)
        if trainer.global_step % every == 0:
            started = time.perf_counter()
            assert isinstance(module, TaskModule)
            module.eval()
            with torch.no_grad():
                score = module.score_on(self.data.val_dataloader() or self.data.test_dataloader(), self.images)
            module.train()
            self.curve.append((trainer.global_step, round(score, 4)))
            self.seconds += time.perf_counter() - started
