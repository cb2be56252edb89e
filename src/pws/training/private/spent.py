"""The privacy that a run has spent."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Spent:
    """The privacy that a run has spent; `summary.json` holds it."""

    epsilon: float | None
    """Any output is at most exp(epsilon) times as likely with an image as without it, but for delta. None: nothing is private,
    for no noise was added."""
    delta: float
    noise: float
    """Deviation of the noise on the summed gradient, in units of clip_norm."""
    clip_norm: float
    sample_rate: float
    """The probability with which each image is in a step's batch."""
    steps: int
    accountant: str
