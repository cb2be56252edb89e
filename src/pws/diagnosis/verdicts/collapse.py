"""The verdict on a collapse in training: what changed since its start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from pws.diagnosis.layer import LayerDiagnosis
from pws.diagnosis.measurement import Measurement
from pws.diagnosis.verdicts.non_finite import non_finite_after, non_finite_layer, non_finite_loss
from pws.diagnosis.verdicts.one_pass import verdict_of
from pws.diagnosis.verdicts.verdict import FACTOR, Verdict, named

RISE: Final = 0.3
"""The rise of a layer's shift share that is the cause of a collapse."""


def has_collapsed(measurement: Measurement, start: Measurement, shift_bound: float) -> bool:
    """Whether filters' means have taken over a layer that counts, or its variance is lost or explodes.

    Lost is a thousandth of the variance at the start; explodes is a millionfold of it, or of 1 where it started lower.
    """
    pairs = [(now, then) for now, then in _pairs(measurement, start) if now.counts and then.counts]
    return any(
        now.shift_share >= shift_bound > then.shift_share
        or now.output.variance < then.output.variance / FACTOR
        or now.output.variance > max(then.output.variance, 1.0) * FACTOR**2
        for now, then in pairs
    )


def collapse_verdict(history: Sequence[Measurement]) -> Verdict:
    """The verdict on a collapse, from all measurements of a training in order; the last one is the first unhealthy."""
    unhealthy = history[-1]
    found = _collapse(history)
    return non_finite_after(unhealthy) if found.cause == "healthy" else found


def _collapse(history: Sequence[Measurement]) -> Verdict:
    unhealthy = history[-1]
    found = non_finite_layer(unhealthy) or non_finite_loss(unhealthy)
    if len(history) == 1 or (found is not None and found.cause != "non-finite output"):
        return verdict_of(unhealthy)
    changed = _changed_since(unhealthy, history[-2]) or _changed_since(unhealthy, history[0])
    return _shift_collapse(history) or changed or verdict_of(unhealthy)


def _shift_collapse(history: Sequence[Measurement]) -> Verdict | None:
    """The collapse as the work of the average gradient, if the shift share of a layer rose by `RISE`."""
    found = max(
        ((d.step, now, then) for d in history for now, then in _pairs(d, history[0])),
        key=lambda found: _rise(found[1], found[2]),
        default=None,
    )
    if found is None or _rise(found[1], found[2]) < RISE:
        return None
    step, now, then = found
    lowest, lr = min((d.critical_lr for d in history[:-1]), default=math.inf), history[-1].settings.lr
    finding = (
        f"The average gradient shifted the filters of {named(now)}. At step {step} their means made "
        f"{100 * now.shift_share:.0f} % of its variance ({100 * then.shift_share:.0f} % at the start), and this variance went "
        f"from {then.output.variance:.2g} to {now.output.variance:.2g}."
    )
    if math.isfinite(lowest):
        finding += f" The critical learning rate before that was {lowest:.2g}"
        finding += f", and training ran at {lr:.3g}." if lr else "."
    remedy = "Convert the network to PWS, whose kernels no step can shift, or lower the learning rate"
    if math.isfinite(lowest) and (lr is None or lowest < lr):
        remedy += f" well below {lowest:.2g}"
    return Verdict("shift", now.name, finding + _outcome(history[-1], history[0]), f"{remedy}.")


def _rise(now: LayerDiagnosis, then: LayerDiagnosis) -> float:
    """The rise of the shift share; minus infinity if it can't be told."""
    rise = now.shift_share - then.shift_share
    return rise if math.isfinite(rise) else -math.inf


def _outcome(unhealthy: Measurement, start: Measurement) -> str:
    """What came of it, if that is more than the shift."""
    for now, then in _pairs(unhealthy, start):
        if not now.finite:
            return f" The output of {named(now)} overflowed at step {unhealthy.step}."
        if now.output.variance < then.output.variance / FACTOR:
            dead = f", and {100 * now.dead_inputs:.0f} % of its inputs were dead" if now.dead_inputs > 0 else ""
            return (
                f" At step {unhealthy.step} the variance of {named(now)} was lost: it fell from "
                f"{then.output.variance:.2g} to {now.output.variance:.2g}{dead}."
            )
    return ""


def _pairs(now: Measurement, then: Measurement) -> list[tuple[LayerDiagnosis, LayerDiagnosis]]:
    """Each layer now and then, without the gates and predictors."""
    before = {layer.name: layer for layer in then.layers if not (layer.gate or layer.predicts)}
    return [(layer, before[layer.name]) for layer in now.layers if layer.name in before]


def _changed_since(unhealthy: Measurement, before: Measurement) -> Verdict | None:
    """The first layer whose output variance has risen or fallen beyond `FACTOR`, without a shift."""
    then = {layer.name: layer.output.variance for layer in before.layers if layer.output.variance > 0}
    for layer in unhealthy.layers:
        change = layer.output.variance / then.get(layer.name, math.nan)
        aside = layer.gate or layer.predicts
        if not layer.finite or not (aside or 1 / FACTOR < change < FACTOR or math.isnan(change)):
            return _changed(layer, unhealthy, before, then.get(layer.name, 0.0))
    return None


def _changed(layer: LayerDiagnosis, unhealthy: Measurement, before: Measurement, variance: float) -> Verdict:
    exploding = not layer.finite or layer.output.variance > variance
    since = f"step {before.step}" if before.step is not None else "the start"
    now = f"{layer.output.variance:.2g}" if layer.finite else "not finite"
    dead = f", and {100 * layer.dead_inputs:.0f} % of its inputs are dead" if layer.dead_inputs > 0.5 else ""
    return Verdict(
        "exploding" if exploding else "vanishing",
        layer.name,
        f"The variance of {named(layer)} {'exploded' if exploding else 'vanished'}: {variance:.2g} at {since}, {now} at "
        f"step {unhealthy.step}. No layer's shift share rose by {100 * RISE:.0f} points{dead}.",
        "The steps were too long: lower the learning rate, or bound the step (clip the gradient to norm 0.1 / lr).",
    )
