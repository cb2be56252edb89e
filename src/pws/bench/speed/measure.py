"""One case: all rows in turn, round by round, so that whatever slows the machine slows them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final

from pws.bench.speed.contestants import Contestant, contestants_of
from pws.bench.speed.networks import WAYS
from pws.bench.speed.suite import Case, Suite

ROUNDS: Final = (3, 200)
"""At least and at most in a process's life, whatever the time."""
TURN: Final = 0.1
"""Seconds that a row's turn in a round takes at least: several steps where one is shorter."""


@dataclass(frozen=True)
class Measured:
    """One row of a case."""

    seconds: tuple[float, ...]
    """Of each round."""
    kept: int
    """`Memory.kept`."""
    peak: int
    """`Memory.peak`."""


def rows_of(case: Case, rows: Sequence[str]) -> list[str]:
    """Those of `rows` that differ in this case: folded, pws is one network, in whatever way it was trained."""
    return [row for row in rows if case.task == "train" or row not in WAYS]


def measure_case(case: Case, suite: Suite, say: Callable[[str], None]) -> dict[str, Measured]:
    """Time the rows of `suite`, those that `rows_of` leaves, for about `suite.seconds`, in `suite.lives` lives of their
    processes."""
    rows = rows_of(case, suite.rows)
    lives = []
    for _ in range(suite.lives):
        with contestants_of(rows) as contestants:
            lives.append(measure_rounds(case, contestants, suite.seconds / suite.lives, say))
    return {row: replace(lives[-1][row], seconds=tuple(s for life in lives for s in life[row].seconds)) for row in rows}


def measure_rounds(
    case: Case, contestants: Mapping[str, Contestant], seconds: float, say: Callable[[str], None]
) -> dict[str, Measured]:
    """Time `contestants` for about `seconds`."""
    rows = list(contestants)
    repeats = {}
    for row in rows:
        say(f"{case}: {row} warms up")
        repeats[row] = max(1, round(TURN / contestants[row].prepare(case)))
    taken: dict[str, list[float]] = {row: [] for row in rows}
    number, end = 0, time.perf_counter() + seconds
    while number < ROUNDS[0] or (number < ROUNDS[1] and time.perf_counter() < end):
        say(f"{case}: round {number + 1}, {max(0.0, end - time.perf_counter()):.0f} s left")
        for i in range(len(rows)):
            row = rows[(number + i) % len(rows)]  # each follows each other one: caches are left differently
            taken[row].append(contestants[row].time(repeats[row]))
        number += 1
    say(f"{case}: memory")
    return {row: Measured(tuple(taken[row]), **asdict(contestants[row].memory())) for row in rows}
