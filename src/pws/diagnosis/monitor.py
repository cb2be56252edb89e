"""`pws.Monitor`: a diagnosis every so often while a model trains, from the training's own passes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from pws._batch import REJECTIONS, count_bad, tensors_in, total
from pws._errors import one_line
from pws._preserve import random_state
from pws.diagnosis._diagnose import bare, diagnosis_of
from pws.diagnosis.diagnosis import Diagnosis
from pws.diagnosis.health_history import CollapseWarning, HealthHistory
from pws.diagnosis.measured_steps import MeasuredSteps
from pws.diagnosis.measurement import Settings
from pws.diagnosis.metrics import append_csv, metrics_of, new_file
from pws.diagnosis.recording.marked import check_optimizer
from pws.diagnosis.recording.moments import is_finite
from pws.diagnosis.recording.recorder import Recorder
from pws.diagnosis.recording.repeated_pass import record_again

Log = Callable[[dict[str, float], int], None]


class Monitor(HealthHistory):
    """Watches a model in training; a context manager.

        with pws.Monitor(model, every=50) as monitor:
            for images, labels in loader:
                loss = monitor.observe(criterion(model(images), labels))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        print(monitor.verdict)

    The first step, those 1, 2, 4, 8 ... later and every `every`-th are measured, from the training's own forward and backward
    pass. Nothing runs twice, and the result of training is unchanged to the bit. A compiled model runs uncompiled in these
    steps. Of the other steps only the outputs are checked; if one is not finite, the forward pass runs again with the same
    random numbers. Gradients that the model or the loss takes are part of the forward pass.

    A step is unhealthy in three cases: an output or the loss is not finite; the shift share of a layer crosses `shift_bound`;
    a layer's variance is lost or explodes. The monitor then keeps the last healthy and the first unhealthy diagnosis, and
    gives a `CollapseWarning`.

    A training step is one forward pass of `model` in training mode. If a step has several, set `monitor.clock` to a function
    that returns the number of the step; the first pass of a step is measured.

    Under a `torch.amp.GradScaler` write `scaler.scale(monitor.observe(loss)).backward()`: the monitor reads the scale from the
    gradient of the loss. If you observe the scaled loss, or none, set `monitor.loss_scale = scaler.get_scale()` in each step.
    Gradients that overflow are then no collapse, for the scaler skips the step and lowers the scale. A verdict on a skipped
    step is taken back at the next healthy measurement.

    Args:
        model: what is trained, as it is called (compiled and parallel wrappers too).
        every: the number of steps between measurements.
        lr: the learning rate that verdicts judge.
        momentum: the momentum of SGD.
        optimizer: the optimizer of a model with marked layers (`pws.mark`). It holds `w`, whose size decides how far a step
            moves the kernel. Without it, the size is taken that an optimizer starts with.
        shift_bound: a layer is taken over when its shift share starts below this bound and reaches it.
        csv_path: a new file for the measurements, one row per layer and step.
        log: called with (metrics, step) at each measurement: a Lightning logger's `log_metrics`, or one line around
            TensorBoard's `add_scalar`.

    Raises:
        PwsError: `every` is below 1, or `shift_bound` is not between 0 and 1. Or the optimizer is one of torch's own and the
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
        super().__init__(shift_bound)
        self._steps = MeasuredSteps(every)
        Settings(lr, momentum)  # which checks them
        check_optimizer(model, optimizer)
        self.model = model
        self.lr, self.momentum, self.optimizer, self.log = lr, momentum, optimizer, log
        self.csv_path = None if csv_path is None else new_file(Path(csv_path))
        self.loss_scale = 1.0
        """What the loss is multiplied with before the backward pass (a GradScaler's scale, one over the accumulated batches),
        where `observe` is given the product, or nothing."""
        self.clock: Callable[[], int] | None = None
        """Tells the number of the present step; None counts forward passes."""
        self._passes = -1
        self._step = 0
        self._loss: Tensor | None = None
        self._factor = 1.0
        """What the observed loss was multiplied with since: its gradient."""
        self._rewind: Callable[[], None] = lambda: None
        self._looked_again = False
        self._looking = False
        self._call: tuple[Any, Any] | None = None
        self._recorder: Recorder | None = None
        self._recorded = -1
        """The pass that it records; its backward pass may come after several others."""
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

    def observe(self, loss: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Take note of the step's loss before its backward pass, and return it; a dict of losses is summed.

        This is optional, for the outputs are checked anyway.
        """
        value: Tensor = total(loss)
        self._loss = value.detach()
        if self._recorder is not None and value.requires_grad and value.numel() == 1:
            value.register_hook(self._keep_factor)
        if self._call is not None and not self._is_over(scaled=self._scaled) and not torch.isfinite(self._loss).all():
            self._look(*self._call)
        return value

    def _keep_factor(self, gradient: Tensor) -> None:
        factor = float(gradient)
        self._factor = factor if 0 < abs(factor) < math.inf else 1.0

    @property
    def _scale(self) -> float:
        """What the network's gradients were multiplied with."""
        return self.loss_scale if self.loss_scale != 1 else self._factor

    @property
    def _scaled(self) -> bool:
        """Whether a GradScaler skips steps whose gradients overflow."""
        return self._scale > 1

    def _before(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._watches(model):
            return
        self._passes += 1
        self._step = self._passes if self.clock is None else self.clock()
        self._call, self._loss = (args, kwargs), None
        self._rewind = random_state(bare(model))
        if self._steps.is_due(self._step):
            self._drop()  # a measurement whose backward pass never came
            inner, self._recorded = bare(model), self._passes
            self._recorder = recorder = Recorder(inner, self.optimizer)
            recorder.backward.on_end = lambda: self._measured(recorder)
            self._recording = recorder.forward(running=(args, kwargs) if inner is model else None)
            self._recording.__enter__()

    def _watches(self, model: nn.Module) -> bool:
        """Whether a pass is one of training, in which something may be learnt."""
        return (
            model.training and torch.is_grad_enabled() and not self._looking and not self._is_over(scaled=self._scaled)
        )

    def _after(self, model: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        if self._recording is not None:
            if outputs is None and self._recorder is not None:  # the model raised
                self._recorder.abandon()
            self._recording.__exit__(None, None, None)
            self._recording = None
        if outputs is None or not self._watches(model):
            return
        floating = [t.detach() for t in tensors_in(outputs) if t.is_floating_point()]
        if all(is_finite(t) or not count_bad(t) for t in floating):
            return
        self._look(args, kwargs)

    def _look(self, args: Any, kwargs: Any) -> None:
        """At a step whose outputs or loss are not finite; once, where that takes another forward pass."""
        measured = self._recorder if self._recorded == self._passes else None
        if measured is None and (self._looked_again or self._is_seen):
            return
        try:
            recorder = measured or self._again(args, kwargs)
        except REJECTIONS as error:
            found = f"step {self._step} is not finite, and its forward pass can't be looked at again: {one_line(error)}"
            warnings.warn(found, CollapseWarning, stacklevel=1)
        else:
            self._unhealthy(recorder)

    @property
    def _is_seen(self) -> bool:
        """Whether this step was found unhealthy already, by its outputs."""
        return self.first_unhealthy is not None and self.history[-1].step == self._step

    def _again(self, args: Any, kwargs: Any) -> Recorder:
        """The forward pass of a step that was not measured, once more."""
        self._looked_again = self._looking = True
        try:
            return record_again(bare(self.model), self.optimizer, self._rewind, args, kwargs)
        finally:
            self._looking = False

    def _measured(self, recorder: Recorder) -> None:
        """The backward pass of a measured step has ended."""
        if recorder is not self._recorder:
            return
        diagnosis, before = self._diagnosis(recorder), self.first_unhealthy
        self._drop()
        self._write(diagnosis)
        self._keep(diagnosis, scaled=self._scaled)
        if before is not None and self.first_unhealthy is None:  # the step was not taken: what comes is new
            self._looked_again = False

    def _unhealthy(self, recorder: Recorder) -> None:
        recorder.forget_backward()
        diagnosis = self._diagnosis(recorder)
        self._drop()
        self._write(diagnosis)
        self._keep_non_finite(diagnosis)

    def _diagnosis(self, recorder: Recorder) -> Diagnosis:
        settings = Settings(self.lr, self.momentum, training=True)
        loss = None if self._loss is None else self._loss * (self._factor / self._scale)
        self._loss = None
        return diagnosis_of(recorder, loss, settings, step=self._step, loss_scale=self._scale)

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
