"""One case: all rows in turn, round by round, so that whatever slows the machine slows them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pws.bench.speed.networks import BACKENDS, backend_of, network
from pws.bench.speed.suite import Case
from pws.surgery import fold

ROUNDS: Final = (5, 200)
"""At least and at most, whatever the time."""
CLASSES: Final = 1000


@dataclass(frozen=True)
class Step:
    """What is timed."""

    run: Callable[[], None]
    model: nn.Module


@dataclass(frozen=True)
class Measured:
    """One row of a case."""

    seconds: tuple[float, ...]
    """Of each round."""
    memory: int
    """Bytes: on a GPU the peak of a step above what was there before it; on a CPU the tensors kept for the backward pass."""


def rows_of(case: Case, rows: Sequence[str]) -> list[str]:
    """Those of `rows` that differ in this case: a compiled or folded network does not use the kernel backends."""
    return [row for row in rows if row not in BACKENDS or not (case.compile or case.task == "inference")]


def measure_case(case: Case, rows: Sequence[str], seconds: float, say: Callable[[str], None]) -> dict[str, Measured]:
    """Time `rows`, those that `rows_of` leaves, for about `seconds`."""
    rows = rows_of(case, rows)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = torch.randn(case.batch, 3, case.pixels, case.pixels, device=device)
    labels = torch.randint(CLASSES, (case.batch,), device=device)
    steps = {}
    for row in rows:
        say(f"{case}: {row} warms up")
        steps[row] = _step(case, row, images, labels)
        for _ in range(2):
            _timed(row, steps[row])
    one_round = sum(_timed(row, step) for row, step in steps.items())
    rounds = min(max(round(seconds / one_round), ROUNDS[0]), ROUNDS[1])
    taken: dict[str, list[float]] = {row: [] for row in rows}
    for number in range(rounds):
        say(f"{case}: round {number + 1} of {rounds}")
        for i in range(len(rows)):
            row = rows[
                (number + i) % len(rows)
            ]  # each follows each other one: caches and allocators are left differently
            taken[row].append(_timed(row, steps[row]))
    return {row: Measured(tuple(taken[row]), _memory(row, steps[row], device)) for row in rows}


def _step(case: Case, row: str, images: Tensor, labels: Tensor) -> Step:
    model = network(case.model, row, case.width).to(images.device)
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


def _timed(row: str, step: Step) -> float:
    with backend_of(row):
        _wait()
        started = time.perf_counter()
        step.run()
        _wait()
        return time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _memory(row: str, step: Step, device: torch.device) -> int:
    with backend_of(row):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step.run()
            return torch.cuda.max_memory_allocated() - before
        with _kept(step.model) as kept:
            step.run()
        return sum(kept.values())


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
