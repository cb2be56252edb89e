"""What a federated run says of itself: a line and a row per round, a picture, a summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from matplotlib.figure import Figure

from pws._files import written_whole
from pws.training.metrics_file import Row

PICTURE: Final = "rounds.png"


@dataclass
class FederatedSummary:
    """How a federated run ended; `summary.json` holds the same."""

    status: str
    """"finished"."""
    score: str
    """The metric that decides which round is the best: accuracy."""
    best: float | None
    """The best score of all rounds on the validation images, in [0, 1]; None if there are none."""
    best_round: int
    """The round whose weights the test images were given to: the best, or the last without validation images."""
    checkpoint: str
    """Its checkpoint: best or last."""
    metrics: dict[str, float]
    """Accuracy and loss on the test images, as far as they are finite."""
    rounds: int
    clients: int
    images_per_client: list[int]
    """The fewest and the most."""
    left_out: dict[str, int]
    """The clients whose replies were left out, to how often."""
    seconds: float
    parameters: int
    device: str
    versions: dict[str, str]


@dataclass
class Progress:
    """How far a run has come; the checkpoint keeps it."""

    number: int = 0
    """Rounds done."""
    seconds: float = 0.0
    best: float | None = None
    best_round: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """On the test images, where norms that stay with clients let them be measured in the best round alone."""
    left_out: dict[str, int] = field(default_factory=dict)


def draw_rounds(rows: Sequence[Row], score: str, path: Path) -> None:
    """The score on the validation images, or without them the loss, by round."""
    name = f"val_{score}" if any(f"val_{score}" in row for row in rows) else "train_loss"
    points = [(int(row["step"]), float(row[name])) for row in rows if name in row]
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([number for number, _ in points], [value for _, value in points], color="#1e8449", marker=".")
    axes.set_xlabel("round")
    axes.set_ylabel(name.replace("val_", "validation ").replace("_", " "))
    axes.grid(alpha=0.3)
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=110)
