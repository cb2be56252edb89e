"""The numbers that are followed over training: metrics for loggers, and rows of a CSV file."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

from pws._errors import PwsError
from pws.diagnosis.measurement import Measurement

LOGGED = (
    *("transmission", "transmission_product", "shift_share", "centred", "shift", "covariance", "gradient_transmission"),
    *("average_gradient", "average_gradient_ratio", "update_ratio", "critical_lr"),
)
"""What is followed of each layer, besides the variances."""


def layer_metrics(layer: Any) -> dict[str, float]:
    """A layer's finite numbers, by name."""
    values = {"input_variance": layer.input.variance, "output_variance": layer.output.variance}
    if layer.gradient is not None:
        values["gradient_variance"] = layer.gradient.variance
    values.update({name: getattr(layer, name) for name in LOGGED})
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def metrics_of(measurement: Measurement) -> dict[str, float]:
    """`monitor/NUMBER/LAYER` for each layer, and the network's critical learning rate and largest shift share."""
    found = {f"monitor/{k}/{layer.name}": v for layer in measurement.layers for k, v in layer_metrics(layer).items()}
    shares = [layer.shift_share for layer in measurement.layers if math.isfinite(layer.shift_share)]
    if shares:
        found["monitor/largest_shift_share"] = max(shares)
    if math.isfinite(measurement.critical_lr):
        found["monitor/critical_lr"] = measurement.critical_lr
    return found


def append_csv(measurement: Measurement, path: Path) -> None:
    """Append one row per layer; a new file begins with the header."""
    columns = ["step", "layer", "loss", "input_variance", "output_variance", "gradient_variance", *LOGGED]
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        for layer in measurement.layers:
            row = {"step": measurement.step, "layer": layer.name, "loss": measurement.loss}
            writer.writerow({**row, **layer_metrics(layer)})


def new_file(path: Path) -> Path:
    """`path`, in a folder that is there; raises `PwsError` if it exists."""
    if path.exists():
        raise PwsError(f"csv_path must be a new file, and {path} exists: nothing is overwritten. Choose another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
