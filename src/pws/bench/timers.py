"""Where a step is timed: on a CPU in a process of its own, on a GPU in this one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from pws.bench.processes import TaskError, Worker
from pws.bench.step_memory import kept_by, peak_of


@dataclass(frozen=True)
class TimedStep:
    """What is timed: a training step, or a forward pass."""

    run: Callable[[], None]
    model: nn.Module
    forward: Callable[[], object] | None = None
    """The part that keeps tensors for the backward pass, where the whole can't be watched."""


Builder = Callable[[], TimedStep]
"""Builds a step where it is timed."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a step needs."""

    kept: int
    """The tensors kept for the backward pass."""
    peak: int
    """The most that is there at once, beyond what is there before it: gradients too, parameters and momentum not."""


class Timer(Protocol):
    """Times one step, wherever it runs."""

    def prepare(self) -> float:
        """Build the step and warm up; returns the seconds of a step."""

    def time(self, steps: int) -> float:
        """Seconds of a step, the mean over `steps`."""

    def memory(self) -> StepMemory:
        """What a step needs."""


class TimerHere:
    """A step in this process."""

    def __init__(self, build: Builder) -> None:
        self._build = build

    def prepare(self) -> float:
        """See `Timer`."""
        self._step = self._build()
        self.time(2)
        return self.time(1)

    def time(self, steps: int) -> float:
        """See `Timer`."""
        _wait()
        started = time.perf_counter()
        for _ in range(steps):
            self._step.run()
        _wait()
        return (time.perf_counter() - started) / steps

    def memory(self) -> StepMemory:
        """See `Timer`."""
        self._step.model.zero_grad()  # a step starts by letting go of the gradients of the one before
        peak = peak_of(self._step.run)
        return StepMemory(kept_by(self._step.forward or self._step.run, self._step.model), peak)


class TimerApart:
    """A step in a process of its own.

    In a heap that all share, what one of them frees decides how many page faults the next one has.
    """

    def __init__(self, row: str, build: Builder) -> None:
        self._row, self._build = row, build
        self._worker = Worker(partial(torch.set_num_threads, torch.get_num_threads()))

    def prepare(self) -> float:
        """See `Timer`."""
        return float(self._call(_prepare, self._build))

    def time(self, steps: int) -> float:
        """See `Timer`."""
        return float(self._call(_time, steps))

    def memory(self) -> StepMemory:
        """See `Timer`."""
        memory: StepMemory = self._call(_memory)
        return memory

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return self._worker.call(function, *arguments)
        except TaskError as error:
            raise TaskError(f"{self._row}: {error}") from error

    def close(self) -> None:
        """End the process."""
        self._worker.close()


@contextmanager
def timers_of(builders: Mapping[str, Builder]) -> Iterator[Mapping[str, Timer]]:
    """A timer for each row. Processes start side by side: they spend seconds importing torch."""
    if torch.cuda.is_available():  # torch's own allocator serves all
        torch.compiler.reset()  # it compiles one class for eight models at most, and runs any further ones as they are
        yield {row: TimerHere(build) for row, build in builders.items()}
        return
    apart = {row: TimerApart(row, build) for row, build in builders.items()}
    try:
        yield apart
    finally:
        for timer in apart.values():
            timer.close()


_here: TimerHere
"""The timer of this process, where `_prepare` was called."""


def _prepare(build: Builder) -> float:
    global _here
    _here = TimerHere(build)
    return _here.prepare()


def _time(steps: int) -> float:
    return _here.time(steps)


def _memory() -> StepMemory:
    return _here.memory()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
