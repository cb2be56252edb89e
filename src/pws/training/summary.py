"""How a run ended: the content of `summary.json`."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from lightning.pytorch import Trainer

from pws.training.callbacks import TEST, Clock, metrics_of
from pws.training.memory import peak_memory
from pws.training.module import NonFiniteLossError, TaskModule
from pws.training.private.spent import Spent
from pws.training.recipe import Recipe


@dataclass
class Summary:
    """How a run ended; `summary.json` holds the same."""

    status: str
    """"finished", or "non-finite"."""
    score: str
    """The metric that decides which checkpoint is the best: accuracy or box_ap."""
    best: float | None
    """The best score of all epochs on the validation images, in [0, 1]; None if there are none."""
    checkpoint: str
    """The one that the test images were given to: best, or last where no validation images tell the best."""
    metrics: dict[str, float]
    """Those of the test images; empty if the loss went non-finite."""
    train_loss: float | None
    epochs: int
    steps: int
    train_seconds: float
    images_per_second: float
    peak_memory_mb: float
    """On a GPU the allocator's peak, else the process's largest resident size."""
    first_non_finite_step: int | None
    first_non_finite_layer: str | None
    verdict: str | None
    """The monitor's, if there was one."""
    privacy: Spent | None
    """(private) What was spent of it."""
    parameters: int
    device: str
    versions: dict[str, str]


def summarize(
    trainer: Trainer,
    module: TaskModule,
    clock: Clock,
    recipe: Recipe,
    metrics: dict[str, float],
    tested: str,
    failure: NonFiniteLossError | None,
    verdict: str | None = None,
) -> Summary:
    """What there is to say at the end of a run."""
    steps, on_gpu = trainer.global_step, trainer.strategy.root_device.type == "cuda"
    peak = peak_memory(trainer.strategy.root_device)
    return Summary(
        status="non-finite" if failure else "finished",
        score=module.SCORE,
        best=clock.best or None,
        checkpoint=tested,
        metrics={} if failure else metrics_of(TEST, metrics),
        train_loss=None if failure else metrics.get("train_loss_epoch"),
        epochs=trainer.current_epoch,
        steps=steps,
        train_seconds=round(clock.seconds, 3),
        images_per_second=round(steps * recipe.data.batch_size / max(clock.seconds, 1e-9), 1),
        peak_memory_mb=round(peak / 2**20, 1),
        first_non_finite_step=failure.step if failure else None,
        first_non_finite_layer=failure.layer if failure else None,
        verdict=verdict,
        privacy=module.spent(),
        parameters=sum(p.numel() for p in module.model.parameters()),
        device=torch.cuda.get_device_name()
        if on_gpu
        else f"{trainer.strategy.root_device.type}, {torch.get_num_threads()} threads",
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Return the versions of Python and of what a run depends on."""
    found = {"python": platform.python_version()}
    for package in ("pws-torch", "torch", "torchvision", "lightning", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
