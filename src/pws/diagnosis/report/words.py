"""Numbers and names as the page and the picture print them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pws.diagnosis.diagnosis import Diagnosis
from pws.diagnosis.layer import LayerDiagnosis

MISSING = "–"
SPACE = "\u00a0"
"""One that no line breaks at."""
ROUNDING = 1e-10
"""A shift share below it is 0: n eps² of float32 at a fan-in n of 5000."""
ENDLESS = "infinite: no step can shift it"
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


def notes(diagnosis: Diagnosis) -> dict[str, list[str]]:
    """Each note and the layers that have it."""
    found: dict[str, list[str]] = {}
    for layer in diagnosis.layers:
        if layer.note:
            found.setdefault(layer.note, []).append(layer.name)
    return found


def why_no_backward(diagnosis: Diagnosis) -> str:
    """Why a number of the backward pass is missing in every layer."""
    if diagnosis.loss is not None and not math.isfinite(diagnosis.loss):
        return f"the loss is {number(diagnosis.loss)}, so there was no backward pass to measure"
    found = notes(diagnosis)
    if len(found) == 1:
        return f"{next(iter(found))} (every layer)"
    return "; ".join(f"{note} ({listed(names, 3)})" for note, names in found.items()) or "no backward pass was measured"


def lr_words(diagnosis: Diagnosis) -> str:
    """What the forecast is for: `3 steps at LR 0.1, momentum 0.9`."""
    s = diagnosis.settings
    steps = "1 step" if s.steps == 1 else f"{s.steps} steps"
    return f"{steps} at LR {s.lr:g}" + (f", momentum {s.momentum:g}" if s.momentum else "")


def shift_of(layer: LayerDiagnosis) -> float:
    """Its shift part; 0 where it is but what rounding leaves of a kernel whose mean is 0.

    Otherwise a standardized layer would stretch a logarithmic axis over ten decades of nothing.
    """
    return 0.0 if layer.shift_share < ROUNDING else layer.shift


def ratio_of(layer: LayerDiagnosis) -> float | None:
    """Its average-gradient ratio; 0 where no filter's average step is more than rounding."""
    step = layer.filters.average_step
    return layer.average_gradient_ratio if step is None or step.any() else 0.0


def note_of(layer: LayerDiagnosis) -> str:
    """What there is to say of a layer besides its numbers."""
    return "; ".join(
        filter(None, (layer.note, "a norm follows" if layer.normalized else "", "a gate" if layer.gate else ""))
    )


def danger(layer: LayerDiagnosis, lr: float | None) -> str:
    """What the judged rate is to a layer: `safe`, `unsafe`, or `normalized`: no step can blow it up, or it is a gate."""
    if not layer.counts:
        return "normalized"
    return "unsafe" if lr is not None and layer.critical_lr is not None and layer.critical_lr <= lr else "safe"
