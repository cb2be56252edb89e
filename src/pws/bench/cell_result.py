"""How a cell of a grid ended, whoever trained it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class CellResult:
    """How a cell ended."""

    accuracy: float | None
    """The task's score in [0, 1]: accuracy, or average precision of boxes; None if the loss went non-finite."""
    train_loss: float | None
    """Mean of the last tenth of the steps; of a federated cell that of the last round."""
    non_finite_step: int | None
    non_finite_layer: str | None
    steps: int
    """Of a federated cell rounds."""
    seconds: float
    """The time of training, without the evaluations."""
    commit: str
    curve: list[tuple[int, float]] = field(default_factory=list)
    """Steps done, score on the first validation images; on the first test images where there are none."""
    metrics: dict[str, float] = field(default_factory=dict)
    """All metrics of all test images."""
    validation: float | None = None
    """The score on the validation images, if there are any."""
