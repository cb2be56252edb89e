"""Steps timed in turn, round by round, so that whatever slows the machine slows them all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Final

from pws.bench.result_file import rounded
from pws.bench.timers import Builder, Timer, timers_of

ROUNDS: Final = (3, 200)
"""At least and at most per process, whatever the time."""
TURN: Final = 0.1
"""Seconds that a row's turn in a round takes at least: several steps where one is shorter."""
Quartiles = tuple[float, float, float]


@dataclass(frozen=True)
class Timing:
    """The rounds of one row."""

    seconds: tuple[float, ...]
    """The time of a step, in each round."""
    kept: int
    """`StepMemory.kept`."""
    peak: int
    """`StepMemory.peak`."""


@dataclass(frozen=True)
class Cost:
    """What a row costs beside another one: what result files hold."""

    ratio: Quartiles
    """The quartiles of the ratios to the other row's time in the same round."""
    seconds: float
    """The median time of a step."""
    rounds: int
    kept: int
    peak: int


def measure(
    title: str, builders: Mapping[str, Builder], seconds: float, processes: int, say: Callable[[str], None]
) -> dict[str, Timing]:
    """Time the steps of all rows for about `seconds`, each row in so many processes, one after the other."""
    parts = []
    for _ in range(processes):
        with timers_of(builders) as timers:
            parts.append(measure_rounds(title, timers, seconds / processes, say))
    return {
        row: replace(last, seconds=tuple(s for part in parts for s in part[row].seconds))
        for row, last in parts[-1].items()
    }


def measure_rounds(
    title: str, timers: Mapping[str, Timer], seconds: float, say: Callable[[str], None]
) -> dict[str, Timing]:
    """Time all rows for about `seconds`."""
    rows = list(timers)
    repeats = {}
    for row in rows:
        say(f"{title}: {row} warms up")
        repeats[row] = max(1, round(TURN / timers[row].prepare()))
    taken: dict[str, list[float]] = {row: [] for row in rows}
    number, end = 0, time.perf_counter() + seconds
    while number < ROUNDS[0] or (number < ROUNDS[1] and time.perf_counter() < end):
        say(f"{title}: round {number + 1}, {max(0.0, end - time.perf_counter()):.0f} s left")
        for i in range(len(rows)):
            row = rows[(number + i) % len(rows)]  # each follows each other one: caches are left differently
            taken[row].append(timers[row].time(repeats[row]))
        number += 1
    say(f"{title}: memory")
    return {row: Timing(tuple(taken[row]), **asdict(timers[row].memory())) for row in rows}


def costs(timings: Mapping[str, Timing], beside: str) -> dict[str, Cost]:
    """What each row costs beside the row called `beside`."""
    return {
        row: Cost(
            ratio=quartiles(timing.seconds, timings[beside].seconds),
            seconds=rounded(statistics.median(timing.seconds)),
            rounds=len(timing.seconds),
            kept=timing.kept,
            peak=timing.peak,
        )
        for row, timing in timings.items()
    }


def quartiles(seconds: tuple[float, ...], others: tuple[float, ...]) -> Quartiles:
    """The quartiles of the ratios, round by round."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(seconds, others, strict=True)], n=4)
    return rounded(low), rounded(middle), rounded(high)


def ratio_text(ratio: Quartiles) -> str:
    """Median and quartiles."""
    low, middle, high = ratio
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"
