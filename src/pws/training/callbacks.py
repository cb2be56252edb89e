"""What a run does beside its steps, and what it counts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.utilities import rank_zero_only
from torch.optim import Optimizer

from pws._clip_grad import clip_grad
from pws.optim.bound import Bound
from pws.training.recipe import OptimConfig

VALIDATION: Final = "val_"
TEST: Final = "test_"
"""What the names of logged metrics begin with."""


def metrics_of(part: str, logged: Mapping[str, Any]) -> dict[str, float]:
    """Of logged metrics those of the validation or the test images, by their names alone."""
    return {name.removeprefix(part): float(value) for name, value in logged.items() if name.startswith(part)}


def is_first_process() -> bool:
    """Whether this process speaks and writes for the run; told by the launcher's environment, before any set-up."""
    rank: int | None = getattr(rank_zero_only, "rank", None)
    return not rank


class Clock(Callback):
    """Seconds spent in training, validation left out, and the best validation score; kept over a resume in the checkpoint."""

    KEPT: Final = ("seconds", "best", "validated_step")

    def __init__(self, score: str = "") -> None:
        self.score = score
        """The logged metric that the best is kept of."""
        self.seconds = 0.0
        self.best = 0.0
        self.validated_step = -1
        self._started = 0.0

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Start counting; the epoch before may have ended without a validation."""
        self.stop()
        self._started = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Stop counting: validation runs inside the training epoch."""
        self.stop()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Keep the best score, and when it was looked at last."""
        self.validated_step = trainer.global_step
        self.best = max(self.best, float(trainer.callback_metrics.get(self.score, 0.0)))

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Stop counting where there was no validation."""
        self.stop()

    def until_now(self) -> float:
        """The seconds, with those since the last start."""
        return self.seconds + (time.perf_counter() - self._started if self._started else 0.0)

    def stop(self) -> None:
        """Add what has passed since the last start; nothing if the clock stands."""
        if self._started:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - self._started
            self._started = 0.0

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint, which may be written while the clock runs."""
        running = time.perf_counter() - self._started if self._started else 0.0
        return {**{key: getattr(self, key) for key in self.KEPT}, "seconds": self.seconds + running}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        for key in self.KEPT:
            setattr(self, key, state_dict[key])


class ClipGrad(Callback):
    """`pws.clip_grad` before every step of any LightningModule: `Trainer(callbacks=[ClipGrad()])`.

    Lightning unscales the gradients before, and accumulates them; leave its own `gradient_clip_val` out.
    """

    def __init__(self, bound: Bound = "auto") -> None:
        self.bound = bound

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        """Shorten the gradients."""
        clip_grad(module, optimizer, self.bound)


def averages(optim: OptimConfig) -> list[Callback]:
    """What keeps the average of the weights, if the recipe wants one."""
    return [] if optim.ema is None else [EMAWeightAveraging(decay=optim.ema)]
