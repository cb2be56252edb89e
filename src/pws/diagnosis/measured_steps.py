"""Which training steps a monitor measures."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from pws._errors import PwsError


class MeasuredSteps:
    """The first step, those 1, 2, 4, 8 ... later, and every `every`-th."""

    def __init__(self, every: int) -> None:
        check_every(every)
        self.every = every
        self._first = 0
        self._last: int | None = None

    def is_due(self, step: int) -> bool:
        """Whether to measure this step; if a multiple of `every` was passed without one, the next step is due."""
        if self._last is None:
            self._first = self._last = step
            return True
        since = step - self._first
        due = step != self._last and (since & (since - 1) == 0 or step // self.every > self._last // self.every)
        if due:
            self._last = step
        return due


def check_every(every: Any) -> None:
    """Raise `PwsError` unless `every` is a number of steps."""
    if not isinstance(every, Integral) or every < 1:
        raise PwsError(
            f"every is the number of steps between measurements: a whole number, at least 1; got {every!r}. Usual: 50."
        )
