"""A verdict, and the bounds that verdicts are drawn by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from pws.diagnosis.layer import LayerDiagnosis

Cause = Literal[
    "healthy",
    "shift",
    "vanishing",
    "exploding",
    "dead",
    "no gradient",
    "non-finite input",
    "non-finite weight",
    "non-finite output",
    "non-finite loss",
    "non-finite gradient",
]

FACTOR: Final = 1e3
"""How far the variance may rise or fall, along the depth or since a run's start, before it counts as lost."""


@dataclass(frozen=True)
class Verdict:
    """Which layer, which cause, what to do."""

    cause: Cause
    layer: str | None
    finding: str
    """What was measured."""
    remedy: str
    """What to do about it."""

    def __str__(self) -> str:
        return f"{self.finding} {self.remedy}".strip()


def named(layer: LayerDiagnosis) -> str:
    """The name of a layer, in quotes."""
    return f"{layer.name!r}"
