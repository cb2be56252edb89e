"""`pws.Monitor`: a diagnosis every so often while a model trains, from the training's own passes."""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from pws.diagnosis.batch import tensors_in
from pws.diagnosis.diagnose import bare, diagnosis_of
from pws.diagnosis.diagnosis import Diagnosis, Settings
from pws.diagnosis.marked import check_optimizer
from pws.diagnosis.preserve import preserved
from pws.diagnosis.record import is_finite
from pws.diagnosis.recorder import Recorder
from pws.diagnosis.verdict import FACTOR, Verdict, collapse_verdict
from pws.errors import PwsError

Log = Callable[[dict[str, float], int], None]


class CollapseWarning(RuntimeWarning):
    """A monitored network went non-finite, or the filters' means took over a layer."""


class Monitor:
    """Watches a model in training; a context manager.

        with pws.Monitor(model, every=50) as monitor:
            for images, labels in loader:
                loss = monitor.observe(criterion(model(images), labels))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        print(monitor.verdict)

    A training step is a forward pass of `model` in training mode; with several passes a step, set `monitor.clock` to a function
    that tells the step's number. The first step, those 1, 2, 4, 8 ... later and every `every`-th are measured from the
    training's own forward and backward pass (the first pass of the step): nothing runs twice, and the result of training
    is unchanged to the bit (a compiled model runs uncompiled in the measured steps). Of the other steps only the outputs are
    looked at. When they (or the loss) go non-finite, or the shift share of a layer crosses `shift_bound`, or a layer's variance
    is lost or explodes, the last healthy and the first unhealthy diagnosis are kept and a `CollapseWarning` says so.

    Args:
        model: what is trained, as it is called (compiled and parallel wrappers too).
        every: steps between measurements.
        lr: the learning rate that verdicts judge by.
        momentum: SGD's.
        optimizer: that of a model with marked layers (`pws.mark`). It holds `w`, whose size decides how far a step moves the
            kernel; without it, the size is assumed that an optimizer starts with.
        shift_bound: the shift share at which a layer that started below it counts as taken over.
        csv_path: a new file to write the measurements to, a row a layer and step.
        log: called with (metrics, step) at each measurement: a Lightning logger's `log_metrics`, or one line around
            TensorBoard's `add_scalar`.

    Raises:
        PwsError: `every` is below 1, or `shift_bound` not between 0 and 1; or the optimizer is one of torch's own and the
            model has marked layers.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 50,
        *,
        lr: float | None = None,
        momentum: float = 0.0,
        optimizer: torch.optim.Optimizer | None = None,
        shift_bound: float = 0.9,
        csv_path: str | Path | None = None,
        log: Log | None = None,
    ) -> None:
        check_every(every)
        if not 0 < shift_bound < 1:
            raise PwsError(
                f"shift_bound is a share of the variance, above 0 and below 1; got {shift_bound}. Usual: 0.9."
            )
        Settings(lr, momentum)  # which checks them
        check_optimizer(model, optimizer)
        self.model, self.every, self.shift_bound = model, every, shift_bound
        self.lr, self.momentum, self.optimizer, self.log = lr, momentum, optimizer, log
        self.csv_path = None if csv_path is None else _new_file(Path(csv_path))
        self.history: list[Diagnosis] = []
        """The diagnoses of the measured steps, in order."""
        self.last_healthy: Diagnosis | None = None
        self.first_unhealthy: Diagnosis | None = None
        self.loss_scale = 1.0
        """What the loss is multiplied with before the backward pass (a GradScaler's scale)."""
        self.clock: Callable[[], int] | None = None
        """Tells the number of the present step; None counts forward passes."""
        self._passes = -1
        self._step = 0
        self._loss: Tensor | None = None
        self._call: tuple[Any, Any] | None = None
        self._first = 0
        self._last: int | None = None
        self._recorder: Recorder | None = None
        self._recording: AbstractContextManager[None] | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> Monitor:
        self._handles = [
            self.model.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True),
            self.model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._drop()
        self._call = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def verdict(self) -> Verdict | None:
        """Of the collapse, if there was one, else of the last measurement; None before the first."""
        shown = self.shown
        return None if shown is None else shown.verdict

    @property
    def shown(self) -> Diagnosis | None:
        """The diagnosis to look at: the first unhealthy one, else the last; None before the first."""
        return self.first_unhealthy or (self.history[-1] if self.history else None)

    def observe(self, loss: Tensor) -> Tensor:
        """Tell the loss of the step, before its backward pass; returns it. Optional: the outputs are looked at anyway."""
        self._loss = loss.detach()
        if self._call is not None and not self._finished() and not torch.isfinite(self._loss):
            self._unhealthy(self._recorder or self._again(*self._call))
        return loss

    def _before(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if not (model.training and torch.is_grad_enabled()) or self._finished():
            return
        self._passes += 1
        self._step = self._passes if self.clock is None else self.clock()
        self._call = (args, kwargs)
        if self._is_due():
            self._drop()  # a measurement whose backward pass never came
            inner = bare(model)
            self._recorder = recorder = Recorder(inner, self.optimizer)
            recorder.on_backward_end = lambda: self._measured(recorder)
            self._recording = recorder.forward(running=(args, kwargs) if inner is model else None)
            self._recording.__enter__()

    def _is_due(self) -> bool:
        """The first step, then 1, 2, 4, 8 ... steps later, and whenever a multiple of `every` is reached or passed."""
        if self._last is None:
            self._first = self._last = self._step
            return True
        since = self._step - self._first
        due = self._step != self._last and (
            since & (since - 1) == 0 or self._step // self.every > self._last // self.every
        )
        if due:
            self._last = self._step
        return due

    def _after(self, model: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        if self._recording is not None:
            if outputs is None and self._recorder is not None:  # the model raised
                self._recorder.abandon()
            self._recording.__exit__(None, None, None)
            self._recording = None
        if outputs is None or not (model.training and torch.is_grad_enabled()) or self._finished():
            return
        if all(is_finite(t.detach()) for t in tensors_in(outputs) if t.is_floating_point()):
            return
        self._unhealthy(self._recorder or self._again(args, kwargs))

    def _again(self, args: Any, kwargs: Any) -> Recorder:
        """The forward pass of a step that was not measured, once more."""
        inner = bare(self.model)
        recorder = Recorder(inner, self.optimizer)
        # The other processes do not run this pass: a synchronized norm would wait for them for ever.
        synchronized = [m for m in inner.modules() if isinstance(m, nn.SyncBatchNorm) and m.training]
        try:
            for norm in synchronized:
                norm.training = False
            with preserved(inner), torch.no_grad(), recorder.forward():
                inner(*args, **kwargs)
        finally:
            for norm in synchronized:
                norm.training = True
        return recorder

    def _measured(self, recorder: Recorder) -> None:
        """The backward pass of a measured step has ended."""
        if recorder is not self._recorder:
            return
        diagnosis = self._diagnosis(recorder)
        self._drop()
        self.history.append(diagnosis)
        self._write(diagnosis)
        if self._collapsed(diagnosis):
            self._keep_unhealthy(diagnosis)
        elif self.first_unhealthy is None:
            self.last_healthy = diagnosis

    def _unhealthy(self, recorder: Recorder) -> None:
        diagnosis = self._diagnosis(recorder)
        self._drop()
        self.history.append(diagnosis)
        self._write(diagnosis)
        self._keep_unhealthy(diagnosis)

    def _keep_unhealthy(self, diagnosis: Diagnosis) -> None:
        if self.first_unhealthy is None:
            self.first_unhealthy = self.history[-1] = replace(diagnosis, explanation=collapse_verdict(self.history))
            warnings.warn(f"step {diagnosis.step}: {self.verdict}", CollapseWarning, stacklevel=1)

    def _diagnosis(self, recorder: Recorder) -> Diagnosis:
        settings = Settings(self.lr, self.momentum, training=True)
        diagnosis = diagnosis_of(recorder, self._loss, settings, step=self._step, loss_scale=self.loss_scale)
        self._loss = None
        return diagnosis

    def _collapsed(self, diagnosis: Diagnosis) -> bool:
        """Whether a number is not finite, or a layer that no norm follows has been taken over by its filters' means, or its
        variance has fallen to a thousandth of what it started with, or risen a millionfold."""
        if diagnosis.verdict.cause.startswith("non-finite"):
            return True
        started = {layer.name: layer for layer in self.history[0].layers}
        return any(
            layer.shift_share >= self.shift_bound > started[layer.name].shift_share
            or layer.output.variance < started[layer.name].output.variance / FACTOR
            or layer.output.variance > max(started[layer.name].output.variance, 1.0) * FACTOR**2
            for layer in diagnosis.layers
            if layer.name in started and not (layer.normalized or started[layer.name].normalized)
        )

    def _finished(self) -> bool:
        """Whether the network is non-finite: there is nothing more to learn."""
        if self.first_unhealthy is None:
            return False
        last = self.history[-1]
        return not all(layer.finite for layer in last.layers) or (
            last.loss is not None and not math.isfinite(last.loss)
        )

    def _drop(self) -> None:
        """Forget a measurement whose backward pass never came, or that is done."""
        if self._recording is not None:
            self._recording.__exit__(None, None, None)
        if self._recorder is not None:
            self._recorder.close()
        self._recorder = self._recording = None

    def _write(self, diagnosis: Diagnosis) -> None:
        if self.log is not None:
            self.log(metrics_of(diagnosis), self._step)
        if self.csv_path is not None:
            append_csv(diagnosis, self.csv_path)


def _new_file(path: Path) -> Path:
    if path.exists():
        raise PwsError(f"csv_path must be a new file, and {path} exists: nothing is overwritten. Choose another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def check_every(every: int) -> None:
    """Raise `PwsError` unless `every` is a number of steps."""
    if every < 1:
        raise PwsError(f"a monitor measures every so many steps, at least 1; got {every}. Usual: 50.")


LOGGED = (
    *("transmission", "transmission_product", "shift_share", "centred", "shift", "covariance", "gradient_transmission"),
    *("average_gradient", "average_gradient_ratio", "update_ratio", "critical_lr"),
)
"""The numbers of a layer that are followed over training, beside the variances."""


def layer_metrics(layer: Any) -> dict[str, float]:
    """A layer's finite numbers, by name."""
    values = {"input_variance": layer.input.variance, "output_variance": layer.output.variance}
    if layer.gradient is not None:
        values["gradient_variance"] = layer.gradient.variance
    values.update({name: getattr(layer, name) for name in LOGGED})
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def metrics_of(diagnosis: Diagnosis) -> dict[str, float]:
    """`monitor/NUMBER/LAYER` for each layer, and the network's critical learning rate and largest shift share."""
    found = {f"monitor/{k}/{layer.name}": v for layer in diagnosis.layers for k, v in layer_metrics(layer).items()}
    shares = [layer.shift_share for layer in diagnosis.layers if math.isfinite(layer.shift_share)]
    if shares:
        found["monitor/largest_shift_share"] = max(shares)
    if math.isfinite(diagnosis.critical_lr):
        found["monitor/critical_lr"] = diagnosis.critical_lr
    return found


def append_csv(diagnosis: Diagnosis, path: Path) -> None:
    """A row a layer; the header first in a new file."""
    columns = ["step", "layer", "loss", "input_variance", "output_variance", "gradient_variance", *LOGGED]
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        for layer in diagnosis.layers:
            row = {"step": diagnosis.step, "layer": layer.name, "loss": diagnosis.loss}
            writer.writerow({**row, **layer_metrics(layer)})
