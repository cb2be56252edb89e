"""A run from recipe to `runs/<name>/`: recipe.yaml, metrics.csv, TensorBoard events, checkpoints/, summary.json."""

from __future__ import annotations

import csv
import json
import platform
import resource
import sys
import warnings
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from pws.errors import PwsError
from pws.methods import build_method
from pws.models import build_model
from pws.training.callbacks import Clock, EpochLines, is_first_process
from pws.training.data import ImageData, check_shares
from pws.training.datasets import Splits
from pws.training.module import Classifier, NonFiniteLossError
from pws.training.recipe import ModelConfig, Recipe


@dataclass
class Summary:
    """How a run ended; `summary.json` holds the same."""

    status: str
    """"finished", or "non-finite"."""
    accuracy: float | None
    """Test accuracy after the last epoch, in [0, 1]."""
    best_accuracy: float | None
    test_loss: float | None
    train_loss: float | None
    epochs: int
    steps: int
    train_seconds: float
    images_per_second: float
    peak_memory_mb: float
    """On a GPU the allocator's peak, else the process's largest resident size."""
    first_non_finite_step: int | None
    first_non_finite_layer: str | None
    parameters: int
    device: str
    versions: dict[str, str]


def train(recipe: Recipe, folder: Path, *, resume: bool = False, quiet: bool = False) -> Summary:
    """Train `recipe` and leave everything in `folder`.

    Args:
        recipe: what to train.
        folder: the run's folder; must not exist unless `resume`.
        resume: go on from the last checkpoint (the end of the last whole epoch) to the result of an uninterrupted run;
            from the start if there is none.
        quiet: print nothing.

    Raises:
        PwsError: the recipe asks for something that does not exist or fit, or the folder exists.
        NonFiniteLossError: the loss went non-finite; summary.json says so too.
    """
    data = ImageData(recipe.data, recipe.seed)
    seed_everything(recipe.seed, workers=True, verbose=False)
    model = model_for(recipe.model, data.splits)
    last = _checkpoint(folder, recipe, resume=resume)
    module = Classifier(model, recipe.optim, len(data.splits.classes), recipe.model.calibrate)
    clock = Clock()
    trainer = _trainer(recipe, folder, clock, quiet=quiet)
    check_shares(len(data.splits.train), recipe.data.batch_size, trainer.world_size, trainer.accumulate_grad_batches)
    if is_first_process():  # from here on there is a folder: everything that bad input can break is behind us
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_dict(recipe), sort_keys=False))
    trainer.loggers = [_csv_logger(folder, last), TensorBoardLogger(folder, name="", version="tensorboard")]
    if not quiet and is_first_process():
        print(_headline(recipe, data, model, folder, last), flush=True)
    failure = None
    try:
        trainer.fit(module, datamodule=data, ckpt_path=last, weights_only=True)
    except NonFiniteLossError as error:
        failure = error
    clock.stop()
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    if (
        failure is None and clock.validated_step != trainer.global_step
    ):  # max_steps ended an epoch before its validation
        metrics.update(trainer.validate(module, datamodule=data, verbose=False)[0])
    summary = _summary(trainer, module, clock, recipe, metrics, failure)
    if trainer.is_global_zero:
        (folder / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n")
    if failure is not None:
        raise failure
    return summary


def model_for(config: ModelConfig, splits: Splits) -> nn.Module:
    """The recipe's network for this data, checked on one image.

    Raises:
        PwsError: another number of classes, an unknown name, an option of another method, or images of a size or with
            values that the network can't take.
    """
    classes = len(splits.classes)
    if config.num_classes not in (None, classes):
        raise PwsError(
            f"model.num_classes must be the data's number of classes; got {config.num_classes}, the data has {classes} "
            f"({', '.join(splits.classes[:5])}{', ...' if classes > 5 else ''}). Leave it out, or check data.name and root."
        )
    options = {key: getattr(config, key) for key in ("gain", "gamma", "relative_gamma")}
    method = build_method(config.method, **{key: value for key, value in options.items() if value is not None})
    image, _ = splits.test.get([0])
    model = build_model(config.name, method, in_channels=image.shape[1], num_classes=classes, width=config.width)
    try:
        with torch.no_grad():
            model.eval()(image.float())
    except RuntimeError as error:
        raise PwsError(
            f"{config.name} can't take images of {image.shape[2]} x {image.shape[3]} pixels ({error}). "
            "Set a larger --data.image_size."
        ) from error
    # Convolutions run faster in this layout, on the CPU (a training step of allconv takes 0.6 to 0.93 of the time) and on
    # GPUs with tensor cores alike; ImageBatches yields the images in it.
    return model.train().to(memory_format=torch.channels_last)


def recipe_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested dictionaries without the settings left out."""
    return {
        key: {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value
        for key, value in asdict(recipe).items()
    }


def _checkpoint(folder: Path, recipe: Recipe, *, resume: bool) -> str | None:
    """The checkpoint to go on from, after making sure that the folder is free, or that its recipe is this one."""
    last, stored = folder / "checkpoints" / "last.ckpt", folder / "recipe.yaml"
    checkpoint = str(last) if resume and last.is_file() else None
    if not is_first_process():  # the run's first process has checked all this before it started the others
        return checkpoint
    if folder.exists() and not resume:
        raise PwsError(
            f"the run folder {folder} exists, and nothing in it is overwritten. Go on with --resume, choose another "
            "--name, or remove the folder."
        )
    if resume and not stored.is_file():
        raise PwsError(f"--resume goes on with a run, but {stored} does not exist. Leave --resume out to start it.")
    if resume:
        _check_same(yaml.safe_load(stored.read_text()), recipe_dict(recipe), stored)
    return checkpoint


def _check_same(stored: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    for part in ("seed", "model", "data", "optim"):
        if stored.get(part) != wanted[part]:
            raise PwsError(
                f"--resume goes on with the same recipe, but {part} differs from {path}: {stored.get(part)} there, "
                f"{wanted[part]} here. Resume with the run's own recipe, or start a run of another --name."
            )


def _trainer(recipe: Recipe, folder: Path, clock: Clock, *, quiet: bool) -> Trainer:
    config = recipe.trainer
    checkpoint = ModelCheckpoint(
        folder / "checkpoints",
        filename="best",
        monitor="val_accuracy",
        mode="max",
        save_last=True,
        save_on_train_epoch_end=True,  # behind the validation: a checkpoint is the end of a whole epoch
        enable_version_counter=False,
    )
    callbacks: list[Callback] = [clock, checkpoint]
    if config.early_stop is not None:
        callbacks.append(EarlyStopping("val_accuracy", mode="max", patience=config.early_stop))
    if not quiet:
        callbacks.append(EpochLines(clock))
    if bar := (not quiet and sys.stdout.isatty()):
        callbacks.append(RichProgressBar())
    try:
        return Trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=config.strategy,
            precision=config.precision,  # type: ignore[arg-type]
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


def _csv_logger(folder: Path, resumed: str | None) -> CSVLogger:
    """Lightning's logger, which deletes what is there: on a resume the rows up to the checkpoint are put back."""
    kept: list[dict[str, Any]] = []
    old = folder / "metrics.csv"
    if resumed is not None and old.is_file():
        step = torch.load(resumed, map_location="cpu", weights_only=True)["global_step"]
        with old.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if int(row["step"]) < step]
    logger = CSVLogger(folder, name="", version="")
    if is_first_process():
        old.unlink(missing_ok=True)
        with warnings.catch_warnings():  # it warns of deleting what is in the folder; there is no metrics.csv any more
            warnings.simplefilter("ignore")
            writer = logger.experiment
        writer.metrics.extend({k: v for k, v in row.items() if v != ""} for row in kept)
    return logger


def _headline(recipe: Recipe, data: ImageData, model: nn.Module, folder: Path, last: str | None) -> str:
    count = sum(p.numel() for p in model.parameters())
    return (
        f"{'resuming' if last else 'training'} {recipe.model.name} with {recipe.model.method} ({count:,} parameters) on "
        f"{recipe.data.name} ({len(data.splits.train):,} images) at learning rate {recipe.optim.lr:g}, batch "
        f"{recipe.data.batch_size}, {recipe.trainer.epochs} epochs -> {folder}"
    )


def _summary(
    trainer: Trainer,
    module: Classifier,
    clock: Clock,
    recipe: Recipe,
    metrics: dict[str, float],
    failure: NonFiniteLossError | None,
) -> Summary:
    steps, on_gpu = trainer.global_step, module.device.type == "cuda"
    # ru_maxrss is in KiB on Linux.
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Summary(
        status="non-finite" if failure else "finished",
        accuracy=None if failure else metrics.get("val_accuracy"),
        best_accuracy=clock.best_accuracy or None,
        test_loss=None if failure else metrics.get("val_loss"),
        train_loss=None if failure else metrics.get("train_loss_epoch"),
        epochs=trainer.current_epoch,
        steps=steps,
        train_seconds=round(clock.seconds, 3),
        images_per_second=round(steps * recipe.data.batch_size / max(clock.seconds, 1e-9), 1),
        peak_memory_mb=round(peak / 2**20, 1),
        first_non_finite_step=failure.step if failure else None,
        first_non_finite_layer=failure.layer if failure else None,
        parameters=sum(p.numel() for p in module.model.parameters()),
        device=torch.cuda.get_device_name() if on_gpu else f"{module.device.type}, {torch.get_num_threads()} threads",
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("pws-torch", "torch", "torchvision", "lightning", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
