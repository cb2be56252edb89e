"""An axis, and where values go that it cannot show: zeros, infinities and NaN stand at its ends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["value", "zero", "infinite", "undefined"]
NAMES: dict[Kind, str] = {"zero": "0", "infinite": "infinite", "undefined": "not a number"}
"""What a legend says of values that have no place on an axis, in its order."""


@dataclass(frozen=True)
class Axis:
    """The ends of an axis; on a logarithmic one a zero has no place of its own."""

    floor: float
    ceiling: float
    log: bool = True

    @property
    def limits(self) -> tuple[float, float]:
        """Where the drawn axis begins and ends, as powers of ten on a logarithmic one: what stands at its ends is whole."""
        low, high = (math.log10(self.floor), math.log10(self.ceiling)) if self.log else (self.floor, self.ceiling)
        room = 0.05 * (high - low)
        return low - room, high + room

    def kind(self, value: float) -> Kind:
        """What a value is on this axis. A variance that rounding left below zero counts as zero."""
        if math.isnan(value):
            return "undefined"
        if math.isinf(value):
            return "infinite"
        return "zero" if self.log and value <= 0 else "value"

    def place(self, value: float) -> float:
        """Where it is drawn."""
        kind = self.kind(value)
        return value if kind == "value" else self.floor if kind == "zero" else self.ceiling


SHARES = Axis(0.0, 1.0, log=False)


def log_axis(values: Iterable[float | None]) -> Axis:
    """An axis over the positive values among these, with room for marks at an end where there are any."""
    known = [value for value in values if value is not None]
    good = [value for value in known if math.isfinite(value) and value > 0]
    low, high = (math.log10(min(good)), math.log10(max(good))) if good else (-1.0, 1.0)
    if high - low < 1:
        low, high = low - 0.5, high + 0.5
    room = 0.1 * (high - low)
    return Axis(
        power(low - room * any(value <= 0 for value in known)),
        power(high + room * any(not math.isfinite(value) for value in known)),
    )


def power(exponent: float) -> float:
    """Ten to the exponent, within what a float holds."""
    return float(10 ** min(max(exponent, -307.0), 308.0))


def linear_axis(values: Iterable[float | None]) -> Axis:
    """An axis from the smallest to the largest of the finite values."""
    good = [value for value in values if value is not None and math.isfinite(value)]
    return Axis(min(good, default=0.0), max(good, default=1.0), log=False)


def split(values: Sequence[float | None], axis: Axis) -> dict[Kind, list[int]]:
    """The indices of the values of each kind; those that are None are left out."""
    found: dict[Kind, list[int]] = {}
    for index, value in enumerate(values):
        if value is not None:
            found.setdefault(axis.kind(value), []).append(index)
    return found
