"""Where the rows of a case run: each in a process of its own on a CPU, all in this one on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from pws.bench.apart import TaskError, Worker
from pws.bench.speed.memory import kept_by, peak_of
from pws.bench.speed.networks import network, optimizer_of, step_of
from pws.bench.speed.suite import Case
from pws.surgery import fold

CLASSES: Final = 1000


@dataclass(frozen=True)
class Step:
    """What is timed."""

    run: Callable[[], None]
    model: nn.Module


@dataclass(frozen=True)
class Memory:
    """Of a step, in bytes."""

    kept: int
    """The tensors kept for the backward pass."""
    peak: int
    """The most that is there at once, beyond what is there before it: gradients too, parameters and momentum not."""


class Contestant(Protocol):
    """One row, wherever it runs."""

    def prepare(self, case: Case) -> float:
        """Build the network of `case` and warm up; returns the seconds of a step."""

    def time(self, steps: int) -> float:
        """Seconds of a step, the mean over `steps`."""

    def memory(self) -> Memory:
        """What a step needs."""


class Here:
    """A row in this process."""

    def __init__(self, row: str) -> None:
        self.row = row

    def prepare(self, case: Case) -> float:
        """See `Contestant`."""
        self._step = _step(case, self.row)
        self.time(2)
        return self.time(1)

    def time(self, steps: int) -> float:
        """See `Contestant`."""
        with step_of(self.row):
            _wait()
            started = time.perf_counter()
            for _ in range(steps):
                self._step.run()
            _wait()
            return (time.perf_counter() - started) / steps

    def memory(self) -> Memory:
        """See `Contestant`."""
        with step_of(self.row):
            self._step.model.zero_grad()  # a step starts by letting go of the gradients of the one before
            peak = peak_of(self._step.run)
            return Memory(kept_by(self._step.run, self._step.model), peak)


class Apart:
    """A row in a process of its own. In a heap that all rows share, what one of them frees decides how many page faults the
    next one has."""

    def __init__(self, row: str) -> None:
        self._row, self._worker = row, Worker(partial(_enter, row, torch.get_num_threads()))

    def prepare(self, case: Case) -> float:
        """See `Contestant`."""
        return float(self._call(_prepare, case))

    def time(self, steps: int) -> float:
        """See `Contestant`."""
        return float(self._call(_time, steps))

    def memory(self) -> Memory:
        """See `Contestant`."""
        memory: Memory = self._call(_memory)
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
def contestants_of(rows: Sequence[str]) -> Iterator[Mapping[str, Contestant]]:
    """Each of `rows`: on a GPU in this process, where torch's own allocator serves all, on a CPU in one of its own. Processes
    start side by side: they spend seconds importing torch."""
    if torch.cuda.is_available():
        torch.compiler.reset()  # it compiles one class for eight models at most, and runs any further ones as they are
        yield {row: Here(row) for row in rows}
        return
    apart = {row: Apart(row) for row in rows}
    try:
        yield apart
    finally:
        for contestant in apart.values():
            contestant.close()


_here: Here
"""The row of this process, where `_enter` was called."""


def _enter(row: str, threads: int) -> None:
    global _here
    torch.set_num_threads(threads)
    _here = Here(row)


def _prepare(case: Case) -> float:
    return _here.prepare(case)


def _time(steps: int) -> float:
    return _here.time(steps)


def _memory() -> Memory:
    return _here.memory()


def _step(case: Case, row: str) -> Step:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = network(case.model, row, case.width).to(device)
    images = torch.randn(case.batch, 3, case.pixels, case.pixels, device=device)
    labels = torch.randint(CLASSES, (case.batch,), device=device)
    if case.channels_last:
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    precision = torch.autocast(images.device.type, torch.bfloat16, enabled=case.autocast)
    if case.task == "inference":
        model = fold(model).eval()
        run: Any = torch.compile(model) if case.compile else model

        def infer() -> None:
            with torch.inference_mode(), precision:
                run(images)

        return Step(infer, model)
    optimizer = optimizer_of(row, model, fused=case.optimizer == "sgd-fused")
    run = torch.compile(model) if case.compile else model

    def train() -> None:
        optimizer.zero_grad()
        with precision:
            loss = F.cross_entropy(run(images), labels)
        torch.autograd.backward(loss)
        optimizer.step()

    return Step(train, model)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
