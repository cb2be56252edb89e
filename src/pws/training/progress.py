"""What a run says while it trains: a line per epoch, a bar over the steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import ProcessingSpeedColumn
from lightning.pytorch.utilities import rank_zero_only

from pws.training.callbacks import VALIDATION, Clock, metrics_of
from pws.training.memory import peak_memory
from pws.training.module import TaskModule


class Pace(Callback):
    """How fast a run goes: images per second of this epoch's training, and the time left, validation included."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._began = self._seconds = 0.0
        self._first_step = self._step = 0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Where this session begins."""
        self._began, self._first_step = time.perf_counter(), trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Where this epoch begins."""
        self._seconds, self._step = self.clock.until_now(), trainer.global_step

    def images_per_second(self, trainer: Trainer) -> float:
        """Of all processes together."""
        size: int = trainer.datamodule.config.batch_size  # type: ignore[attr-defined]
        return (trainer.global_step - self._step) * size / max(self.clock.until_now() - self._seconds, 1e-9)

    def seconds_left(self, trainer: Trainer) -> float | None:
        """As this session went so far; None before its first step, and at the end."""
        done, left = trainer.global_step - self._first_step, _all_steps(trainer) - trainer.global_step
        return (time.perf_counter() - self._began) / done * left if done and left > 0 else None

    def words(self, trainer: Trainer) -> dict[str, str]:
        """Images per second, peak memory, and the time left if there is any."""
        left = self.seconds_left(trainer)
        return {
            "images/s": f"{self.images_per_second(trainer):,.0f}",
            "GB": f"{peak_memory(trainer.strategy.root_device) / 2**30:.1f}",
            **({} if left is None else {"left": duration(left)}),
        }


def _all_steps(trainer: Trainer) -> int:
    """Of the whole run."""
    return int(trainer.estimated_stepping_batches)


def duration(seconds: float) -> str:
    """In words.

    Examples:
        >>> [duration(seconds) for seconds in (0.4, 119, 200, 9000)]
        ['0 s', '119 s', '3 min', '2.5 h']
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class StepBar(RichProgressBar):
    """A bar over the steps of the epoch, with the loss and the pace; the epoch's line says the rest."""

    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self.pace = pace

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Lightning's, but for batches per second."""
        columns = super().configure_columns(trainer)
        return [column for column in columns if not isinstance(column, ProcessingSpeedColumn)]

    def get_metrics(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """What stands behind the bar."""
        shown = {key: value for key, value in trainer.callback_metrics.items() if key.endswith("_step")}
        losses = {_short(key): f"{float(value):.4g}" for key, value in shown.items()}
        return {**losses, **(self.pace.words(trainer) if trainer.training else {})}

    def _get_train_description(self, current_epoch: int) -> str:
        return f"epoch {current_epoch + 1}/{self.trainer.max_epochs}"  # counted like the epoch's line


def _short(key: str) -> str:
    return key.removeprefix("train_").removesuffix("_step").removeprefix("loss_")


class EpochLines(Callback):
    """One line per epoch, for terminals and log files alike."""

    def __init__(self, pace: Pace, score_line: Callable[[dict[str, float]], str], *, validates: bool) -> None:
        self.pace, self.score_line, self.validates = pace, score_line, validates

    @rank_zero_only
    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Print the epoch's line."""
        clock = self.pace.clock
        if self.validates and clock.validated_step != trainer.global_step:
            return  # max_steps ended the epoch before its validation
        score = (
            f"validation {self.score_line(metrics_of(VALIDATION, trainer.callback_metrics))}  "
            if self.validates
            else ""
        )
        words = self.pace.words(trainer)
        left = f", {words['left']} left" if "left" in words else ""
        spent = module.spent() if isinstance(module, TaskModule) else None
        score += (
            ""
            if spent is None
            else f"epsilon {'infinite' if spent.epsilon is None else format(spent.epsilon, '.2f')}  "
        )
        print(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  "
            f"loss {float(trainer.callback_metrics['train_loss_epoch']):.4f}  {score}{words['images/s']} images/s  "
            f"{words['GB']} GB  {duration(clock.seconds)}{left}",
            flush=True,
        )
