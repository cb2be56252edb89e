"""A cell of a grid whose recipe is federated: its steps are rounds."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from pws.bench.cell_result import CellResult
from pws.bench.result_file import commit
from pws.training.metrics_file import MetricsFile, rows_before
from pws.training.recipe import Recipe


def federate_cell(recipe: Recipe) -> CellResult:
    """Train as `pws federate` does; the curve is the accuracy on all validation images, by round.

    Raises:
        PwsError: what `federate` raises it for, but for clients that have all sent numbers which are not finite.
    """
    from pws.federated import NobodyLeftError, federate  # Flower, which other cells do without

    with TemporaryDirectory() as parent:
        folder = Path(parent) / "run"
        try:
            summary = federate(recipe, folder, quiet=True)
        except NobodyLeftError as error:
            if not error.overflowed:
                raise
            return CellResult(None, None, error.number, None, error.number - 1, 0.0, commit())
        rows, _ = rows_before(folder / MetricsFile.NAME, summary.rounds + 1)
    return CellResult(
        accuracy=summary.metrics["accuracy"],
        train_loss=round(float(rows[-1]["train_loss"]), 4),
        non_finite_step=None,
        non_finite_layer=None,
        steps=summary.rounds,
        seconds=round(summary.seconds, 2),
        commit=commit(),
        curve=[(int(row["step"]), float(row["val_accuracy"])) for row in rows if "val_accuracy" in row],
        metrics=summary.metrics,
        validation=summary.best,
    )
