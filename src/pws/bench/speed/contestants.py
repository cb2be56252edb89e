"""Where the rows of a case run: each in a process of its own on a CPU, all in this one on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pws.bench.speed.networks import backend_of, network
from pws.bench.speed.suite import Case
from pws.surgery import fold

CLASSES: Final = 1000


@dataclass(frozen=True)
class Step:
    """What is timed."""

    run: Callable[[], None]
    model: nn.Module


class Contestant(Protocol):
    """One row, wherever it runs."""

    def prepare(self, case: Case) -> float:
        """Build the network of `case` and warm up; returns the seconds of a step."""

    def time(self, steps: int) -> float:
        """Seconds of a step, the mean over `steps`."""

    def memory(self) -> int:
        """`Measured.memory`."""


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
        with backend_of(self.row):
            _wait()
            started = time.perf_counter()
            for _ in range(steps):
                self._step.run()
            _wait()
            return (time.perf_counter() - started) / steps

    def memory(self) -> int:
        """See `Contestant`."""
        with backend_of(self.row):
            if torch.cuda.is_available():
                self._step.model.zero_grad()  # a step starts by letting go of the gradients of the one before
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                self._step.run()
                return torch.cuda.max_memory_allocated() - before
            with _kept(self._step.model) as kept:
                self._step.run()
            return sum(kept.values())


class Apart:
    """A row in a process of its own. In a heap that all rows share, what one of them frees decides how many page faults the
    next one has."""

    def __init__(self, row: str) -> None:
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), _enter, (row, torch.get_num_threads()))

    def start(self) -> None:
        """Get the process going; returns at once."""
        self._pool.submit(_start)

    def prepare(self, case: Case) -> float:
        """See `Contestant`."""
        return self._pool.submit(_prepare, case).result()

    def time(self, steps: int) -> float:
        """See `Contestant`."""
        return self._pool.submit(_time, steps).result()

    def memory(self) -> int:
        """See `Contestant`."""
        return self._pool.submit(_memory).result()

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown(cancel_futures=True)


@contextmanager
def contestants_of(rows: Sequence[str]) -> Iterator[Mapping[str, Contestant]]:
    """Each of `rows`: on a GPU in this process, where torch's own allocator serves all, on a CPU in one of its own. Processes
    start side by side: they spend seconds importing torch."""
    if torch.cuda.is_available():
        torch.compiler.reset()  # it compiles one class for eight models at most, and runs any further ones as they are
        yield {row: Here(row) for row in rows}
        return
    apart = {row: Apart(row) for row in rows}
    for contestant in apart.values():
        contestant.start()
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


def _start() -> None:
    """Nothing: a process that is to do it starts."""


def _prepare(case: Case) -> float:
    return _here.prepare(case)


def _time(steps: int) -> float:
    return _here.time(steps)


def _memory() -> int:
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
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
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


@contextmanager
def _kept(model: nn.Module) -> Iterator[dict[int, int]]:
    """Address to bytes of what autograd keeps, without the parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
