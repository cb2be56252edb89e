"""`pws.Monitor` as a Lightning callback."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer

from pws._errors import PwsError
from pws._files import write_whole
from pws.diagnosis import Monitor
from pws.diagnosis.measured_steps import check_every
from pws.diagnosis.report import require_plotly
from pws.optim import SGD
from pws.training.callbacks import is_first_process
from pws.training.module import NonFiniteLossError
from pws.training.recipe import Recipe


class MonitorCallback(Callback):
    """Watch a LightningModule's network in training, and log the measurements to the trainer's loggers.

    Args:
        every: optimizer steps between measurements (also at steps 0, 1, 2, 4, 8 ...).
        attribute: the LightningModule's attribute that is the network: the module that its `training_step` calls.
        shift_bound: see `pws.Monitor`.

    The `monitor` attribute has the history, the last healthy and the first unhealthy diagnosis, and the verdict. With several
    processes the first one measures, its own share of the batch.
    """

    def __init__(self, every: int = 50, *, attribute: str = "model", shift_bound: float = 0.9) -> None:
        check_every(every)
        self.every, self.attribute, self.shift_bound = every, attribute, shift_bound
        self.monitor: Monitor | None = None
        self._open = ExitStack()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Start watching."""
        network = getattr(module, self.attribute, None)
        if not isinstance(network, nn.Module):
            raise PwsError(
                f"MonitorCallback watches the network that training_step calls, and {type(module).__name__} has no module "
                f"called {self.attribute!r}. Pass attribute= its name."
            )
        if not is_first_process():
            return
        self.monitor = Monitor(
            network,
            self.every,
            shift_bound=self.shift_bound,
            log=lambda metrics, step: _log(trainer, metrics, step),
        )
        self.monitor.clock = lambda: trainer.global_step
        self._open.enter_context(self.monitor)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The verdict judges by the step's own learning rate, if it is SGD's: critical rates are those of SGD."""
        if self.monitor is not None:
            self.monitor.optimizer, group = _optimizer_of(trainer, self.monitor.model)
            sgd = group if isinstance(self.monitor.optimizer, torch.optim.SGD | SGD) else {}
            self.monitor.lr, self.monitor.momentum = sgd.get("lr") or None, sgd.get("momentum", 0.0)

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        """Tell the loss, and what it was multiplied with."""
        if self.monitor is None:
            return
        precision = trainer.precision_plugin
        scaler = precision.scaler if isinstance(precision, MixedPrecision) else None
        scale = scaler.get_scale() if isinstance(scaler, torch.amp.GradScaler) else 1.0
        self.monitor.loss_scale = scale / trainer.accumulate_grad_batches
        self.monitor.observe(loss)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Stop watching."""
        self._open.close()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Stop watching; a loss that went non-finite behind finite outputs was not seen yet."""
        if isinstance(exception, NonFiniteLossError) and self.monitor is not None:
            self.monitor.observe(torch.tensor(math.nan))
        self._open.close()


def _optimizer_of(trainer: Trainer, network: nn.Module) -> tuple[Optimizer | None, dict[str, Any]]:
    """The optimizer, and its group, that holds the network's first trained parameter; None and empty if there is none."""
    first = next((parameter for parameter in network.parameters() if parameter.requires_grad), None)
    groups = [(optimizer, group) for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return next((pair for pair in groups if any(parameter is first for parameter in pair[1]["params"])), (None, {}))


def _log(trainer: Trainer, metrics: dict[str, float], step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step)


def watcher(every: int, recipe: Recipe) -> MonitorCallback:
    """The callback of a run.

    Raises:
        PwsError: `every` is below 1, the run is private, layers run twice in a step, or what writes the report is not
            installed.
    """
    if recipe.privacy.wanted:
        raise PwsError(
            "--monitor writes down what layers do with private images, which no epsilon counts. Leave it out, or watch a run "
            "on public images without privacy."
        )
    if recipe.trainer.checkpoint_activations:
        raise PwsError(
            "--monitor measures one pass per step, and trainer.checkpoint_activations runs blocks twice. Leave one of them out."
        )
    check_every(every)
    require_plotly()
    return MonitorCallback(every)


def leave_report(
    watch: MonitorCallback, folder: Path, name: str, failure: NonFiniteLossError | None
) -> NonFiniteLossError | None:
    """Write diagnosis.html and diagnosis.json; returns the failure, which then carries the verdict."""
    monitor = watch.monitor
    if monitor is None or monitor.shown is None:
        return failure
    report = monitor.shown.html(folder / "diagnosis.html", history=monitor.history, title=name)
    kept = {"last_healthy": monitor.last_healthy, "first_unhealthy": monitor.first_unhealthy}
    content = {"verdict": str(monitor.verdict), **{k: None if d is None else d.to_dict() for k, d in kept.items()}}
    write_whole(folder / "diagnosis.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    if failure is None:
        return None
    return NonFiniteLossError(failure.step, failure.layer, f"{monitor.verdict} Report: {report}", what=failure.what)
