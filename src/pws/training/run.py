"""A run from recipe to `runs/<name>/`: recipe.yaml, data.json, metrics.csv, TensorBoard events, checkpoints/, summary.json."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import DoublePrecision

from pws._errors import PwsError, one_line
from pws._files import write_whole
from pws.training.agreement import LostProcessError, agree, one_voice
from pws.training.callbacks import VALIDATION, Clock, averages, is_first_process
from pws.training.checkpoint_writers import BestCheckpoint, CheckpointFiles, checkpoint_callbacks
from pws.training.checkpointing import checkpoint_activations
from pws.training.checkpoints import BEST, load_weights
from pws.training.compiling import Compile
from pws.training.data import RecipeData, check_shares, check_tested
from pws.training.epoch_means import EpochMeans
from pws.training.facts import write_facts
from pws.training.loggers import closed, named_loggers
from pws.training.metrics_file import MetricsFile
from pws.training.module import NonFiniteLossError, TaskModule
from pws.training.monitor import MonitorCallback, leave_report, watcher
from pws.training.progress import EpochLines, Pace, StepBar
from pws.training.quiet import real_interrupts
from pws.training.recipe import FSDP2, Recipe
from pws.training.run_folder import CHECKPOINTS, SUMMARY, Start, claimed, has_checkpoint, resume_from, take_up
from pws.training.sharded import Sharded
from pws.training.summary import Summary, summarize
from pws.training.tasks import Task, module_of, trained_task

LOST: Final = ("gloo/transport", "by peer", "NCCL")
"""What the errors say that torch raises where another process is gone; they have no class of their own."""


@one_voice()
def train(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    monitor: int | None = None,
    task: Task | None = None,
) -> Summary:
    """Train `recipe` and leave everything in `folder`.

    Args:
        recipe: what to train.
        folder: the run's folder; must not exist unless `resume`.
        resume: go on from the last checkpoint (the end of an epoch, or within one with `trainer.checkpoint_steps`) to the
            result of an uninterrupted run; from the start if there is none.
        quiet: print nothing.
        monitor: diagnose the network every so many steps, and leave diagnosis.html and diagnosis.json in the folder.
        task: what is trained on what, in place of the recipe's task of that name; `fit` makes one.

    Raises:
        PwsError: the recipe asks for something that does not exist or fit, or the folder exists.
        NonFiniteLossError: the loss went non-finite; summary.json says so too.
    """
    watch = None if monitor is None else watcher(monitor, recipe)
    task = trained_task(recipe, task)
    data = task.data(recipe.data, recipe.seed)
    seed_everything(recipe.seed, workers=True, verbose=False)
    module = _module(recipe, data, task, fresh=not (resume and has_checkpoint(folder)))
    clock = Clock(VALIDATION + module.SCORE)
    validates = data.splits.validation is not None
    trainer = _trainer(recipe, module, folder, clock, watch, validates=validates, quiet=quiet)
    check_shares(len(data.splits.train), recipe.data.batch_size, trainer.world_size, trainer.accumulate_grad_batches)
    check_tested(data.splits, trainer.world_size)
    with claimed(folder, recipe, resume=resume), closed(trainer):
        start = resume_from(folder, recipe, module) if resume else Start()
        data.first_epoch, data.first_batch = start.epoch, start.batch
        if is_first_process():
            if resume:
                take_up(folder, recipe)
            write_facts(folder, task.facts.of(data))
            _say(_headline(recipe, data, module, folder, start, resume=resume), start, quiet=quiet)
        board = TensorBoardLogger(folder, name="", version="tensorboard", purge_step=start.step or None)
        trainer.loggers = [MetricsFile(folder, start.rows), board, *named_loggers(recipe, folder, quiet=quiet)]
        if trainer.world_size > 1:
            agree()
        failure, metrics = _fit(trainer, module, data, start.checkpoint, clock)
        best = folder / CHECKPOINTS / BEST
        tested = best if validates and best.exists() else None
        if failure is None:
            failure, found = _test(trainer, module, data, recipe, tested)
            metrics |= found
        verdict = None if watch is None or watch.monitor is None else watch.monitor.verdict
        checkpoint, said = "best" if tested else "last", None if verdict is None else str(verdict)
        summary = summarize(trainer, module, clock, recipe, metrics, checkpoint, failure, said)
        if trainer.is_global_zero:
            write_whole(folder / SUMMARY, json.dumps(asdict(summary), indent=2, allow_nan=False) + "\n")
            if watch is not None:
                failure = leave_report(watch, folder, recipe.name, failure)
        if failure is not None:
            raise failure
    return summary


def _module(recipe: Recipe, data: RecipeData, task: Task, *, fresh: bool) -> TaskModule:
    """The recipe's network, as it is trained."""
    module = module_of(recipe, data, fresh=fresh, task=task)
    if recipe.trainer.precision == "64-true":
        module.double()  # Lightning would do so behind the reading of a checkpoint, whose last digits would be lost
    if recipe.trainer.checkpoint_activations:
        checkpoint_activations(module.model)
    return module


def _fit(
    trainer: Trainer, module: TaskModule, data: RecipeData, last: Path | None, clock: Clock
) -> tuple[NonFiniteLossError | None, dict[str, float]]:
    """Train; the failure, if the loss went non-finite, and the last metrics."""
    failure, metrics = None, {}
    try:
        with real_interrupts():
            trainer.fit(module, datamodule=data, ckpt_path=last, weights_only=True)
            metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
            if data.splits.validation is not None and clock.validated_step != trainer.global_step:
                _validate_end(trainer, module, data, clock)
    except NonFiniteLossError as error:
        failure = error
    except RuntimeError as error:
        if not any(word in str(error) for word in LOST):
            raise
        raise LostProcessError(
            f"another process of the run ended, and this one can't go on without it ({one_line(error)[:120]}). What that one "
            "said stands above, or in its log; the system may have killed it for its memory. --resume goes on."
        ) from error
    clock.stop()
    return failure, metrics


def _validate_end(trainer: Trainer, module: TaskModule, data: RecipeData, clock: Clock) -> None:
    """Validate where max_steps has ended an epoch before its validation: the end may be the best."""
    before = clock.best
    trainer.validate(module, datamodule=data, verbose=False)
    if clock.best > before or not before:
        best = next(c for c in trainer.checkpoint_callbacks if isinstance(c, BestCheckpoint))
        trainer.save_checkpoint(Path(str(best.dirpath)) / BEST)
        if isinstance(trainer.strategy, Sharded):
            trainer.strategy.wait()


def _test(
    trainer: Trainer, module: TaskModule, data: RecipeData, recipe: Recipe, checkpoint: Path | None
) -> tuple[NonFiniteLossError | None, dict[str, float]]:
    """The metrics of the test images with the weights of a checkpoint, or the present ones; or how they failed."""
    if checkpoint is not None:
        load_weights(module, checkpoint, recipe)
    try:
        with real_interrupts():
            found = trainer.test(module, datamodule=data, verbose=False)
    except NonFiniteLossError as error:
        return error, {}
    return None, dict(found[0])


def _trainer(
    recipe: Recipe,
    module: TaskModule,
    folder: Path,
    clock: Clock,
    watch: MonitorCallback | None,
    *,
    validates: bool,
    quiet: bool,
) -> Trainer:
    config = recipe.trainer
    score = VALIDATION + module.SCORE
    callbacks: list[Callback] = [EpochMeans(), clock]
    callbacks += checkpoint_callbacks(folder / CHECKPOINTS, config, score if validates else None)
    callbacks += averages(recipe.optim)
    if watch is not None:
        callbacks.append(watch)
    if config.early_stop is not None:
        callbacks.append(EarlyStopping(score, mode="max", patience=config.early_stop, strict=False))
    if config.compile:
        callbacks.append(Compile())
    pace = Pace(clock)
    if not quiet:
        callbacks += [pace, EpochLines(pace, module.score_line, validates=validates)]
    if bar := (not quiet and sys.stdout.isatty()):
        callbacks.append(StepBar(pace))
    try:
        return Trainer(
            accelerator=config.accelerator,
            devices=1 if recipe.privacy.wanted else config.devices,  # PoissonSampler and the noise know no others
            num_nodes=config.num_nodes,
            **_strategy(recipe),
            max_epochs=config.epochs,
            max_steps=-1 if config.max_steps is None else config.max_steps,
            accumulate_grad_batches=config.accumulate,
            gradient_clip_val=recipe.optim.clip_norm,
            logger=False,
            callbacks=callbacks,
            log_every_n_steps=10,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_progress_bar=bar,
            enable_model_summary=False,
            default_root_dir=folder,
        )
    except (
        ValueError,
        TypeError,
        RuntimeError,
        MisconfigurationException,
    ) as error:
        raise PwsError(f"Lightning refuses the trainer settings {asdict(config)}: {error}") from error


def _strategy(recipe: Recipe) -> dict[str, Any]:
    """The Trainer's strategy and precision, and what stores checkpoints."""
    config = recipe.trainer
    if config.strategy != FSDP2:
        return {"strategy": config.strategy, "precision": config.precision, "plugins": CheckpointFiles(recipe)}
    if config.precision == "64-true":  # Lightning's list for this strategy leaves it out, and it works
        return {"strategy": Sharded(recipe), "plugins": DoublePrecision()}
    return {"strategy": Sharded(recipe), "precision": config.precision}


def _headline(recipe: Recipe, data: RecipeData, module: TaskModule, folder: Path, start: Start, *, resume: bool) -> str:
    count = sum(p.numel() for p in module.model.parameters())
    again = "no checkpoint was written yet, the run starts again: " if resume and start.checkpoint is None else ""
    return (
        f"{again}{'resuming' if start.checkpoint else 'training'} {recipe.model.name} with {recipe.model.method} "
        f"({count:,} parameters) on {recipe.data.name} ({len(data.splits.train):,} images) at learning rate "
        f"{recipe.optim.lr:g}, batch {recipe.data.batch_size}, {recipe.trainer.epochs} epochs -> {folder}"
    )


def _say(headline: str, start: Start, *, quiet: bool) -> None:
    if not quiet:
        print(headline, flush=True)
    for note in start.notes:
        print(f"pws: {note}", file=sys.stderr)
