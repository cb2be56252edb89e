"""Numbers and names as the report prints them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pws.diagnosis.layer import LayerDiagnosis

MISSING = "–"
SPACE = "\u00a0"
"""One that no line breaks at."""
TICK = 20
"""The longest layer name under an axis; of a longer one the end is kept, which tells layers apart."""


def number(value: float | None) -> str:
    """Three digits; a dash for what is not there."""
    if value is None:
        return MISSING
    if math.isfinite(value):
        return f"{value:.3g}"
    return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"


def percent(share: float | None) -> str:
    """A share as a percentage."""
    if share is None or not math.isfinite(share):
        return number(share)
    if 0 < share < 0.001:
        return f"<{SPACE}0.1{SPACE}%"
    return f"{100 * share:.1g}{SPACE}%" if 0 < share < 0.01 else f"{100 * share:.0f}{SPACE}%"


def shape(layer: LayerDiagnosis) -> str:
    """The kernel's: `64 × 32 × 3 × 3`."""
    return " × ".join(map(str, layer.kernel_shape))


def short(name: str) -> str:
    """A name for an axis."""
    return name if len(name) <= TICK else "…" + name[1 - TICK :]


def listed(names: Sequence[str], most: int = 6) -> str:
    """The first of them, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
