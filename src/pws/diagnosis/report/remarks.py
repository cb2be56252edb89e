"""What the report says in words about layers and missing numbers."""

from __future__ import annotations

import math

from pws.diagnosis.layer import LayerDiagnosis
from pws.diagnosis.measurement import Measurement
from pws.diagnosis.report.number_format import listed, number


def remark_on(layer: LayerDiagnosis) -> str:
    """What there is to say about a layer besides its numbers."""
    words = {"a norm follows": layer.normalized, "a gate": layer.gate, "it predicts": layer.predicts}
    return "; ".join(filter(None, (layer.note, *(word for word, holds in words.items() if holds))))


def layers_by_note(measurement: Measurement) -> dict[str, list[str]]:
    """Each note, and the layers that have it."""
    found: dict[str, list[str]] = {}
    for layer in measurement.layers:
        if layer.note:
            found.setdefault(layer.note, []).append(layer.name)
    return found


def why_no_backward(measurement: Measurement) -> str:
    """Why a number of the backward pass is missing in every layer."""
    if measurement.loss is not None and not math.isfinite(measurement.loss):
        return f"the loss is {number(measurement.loss)}, so there was no backward pass to measure"
    found = layers_by_note(measurement)
    if len(found) == 1:
        return f"{next(iter(found))} (every layer)"
    return "; ".join(f"{note} ({listed(names, 3)})" for note, names in found.items()) or "no backward pass was measured"


def judged_steps(measurement: Measurement) -> str:
    """The steps that shift shares are predicted for: `3 steps at LR 0.1, momentum 0.9`."""
    s = measurement.settings
    steps = "1 step" if s.steps == 1 else f"{s.steps} steps"
    return f"{steps} at LR {s.lr:g}" + (f", momentum {s.momentum:g}" if s.momentum else "")
