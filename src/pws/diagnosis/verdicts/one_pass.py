"""The verdict on one pass, from what was measured in it alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from pws.diagnosis.layer import LayerDiagnosis
from pws.diagnosis.measurement import Measurement
from pws.diagnosis.verdicts.non_finite import non_finite_gradient, non_finite_layer, non_finite_loss
from pws.diagnosis.verdicts.verdict import FACTOR, Verdict, named

AHEAD: Final = "training may break earlier. pws.forecast (or --forecast) looks ahead."
DEAD: Final = 0.99
"""The share of zero inputs at which a layer counts as cut off."""


def verdict_of(measurement: Measurement) -> Verdict:
    """Return the first that holds: non-finite, dead, no gradient, exploding or vanishing, shift; else healthy."""
    checks: list[Callable[[Measurement], Verdict | None]]
    checks = [non_finite_layer, non_finite_loss, non_finite_gradient, _dead, _no_gradient, _along_the_depth, _shift]
    found = (check(measurement) for check in checks)
    return next((verdict for verdict in found if verdict is not None), None) or _healthy(measurement)


def _dead(measurement: Measurement) -> Verdict | None:
    layer = next((la for la in measurement.layers[1:] if la.dead_inputs >= DEAD and not la.gate), None)
    if layer is None:
        return None
    return Verdict(
        "dead",
        layer.name,
        f"The units in front of {named(layer)} are dead: {100 * layer.dead_inputs:.0f} % of its input channels are zero for "
        "the whole batch, and no gradient passes.",
        "Start again with a lower learning rate, or convert the network to PWS.",
    )


def _no_gradient(measurement: Measurement) -> Verdict | None:
    layers = [layer for layer in measurement.layers if layer.gradient is not None]
    if not layers or layers[0].gradient is None or layers[0].gradient.second_moment > 0:
        return None
    *before, last = [layer for layer in layers if layer.gradient is not None and layer.gradient.second_moment == 0]
    too = f", nor {len(before)} of the layers before it" if before else ""
    return Verdict(
        "no gradient",
        last.name,
        f"No gradient reaches {named(last)}{too}: what follows multiplies it by zero, or the loss does not depend on it.",
        "Some layers start at zero on purpose (a head, the last layer of a branch): then diagnose again after one step.",
    )


def _along_the_depth(measurement: Measurement) -> Verdict | None:
    """The first layer whose variance is beyond `FACTOR` of the first layer's.

    Networks with norms are not judged, for a norm sets the scale anew. Left out are gates, outputs that are constant (a branch
    that starts at zero), and the last layer, whose scale is its own.
    """
    if any(layer.normalized and not layer.gate for layer in measurement.layers):
        return None
    layers = [layer for layer in measurement.layers if not layer.gate]
    layers = [layer for layer in layers[:-1] if layer.output.variance > 0]
    scales = [layer.output.variance / layers[0].output.variance for layer in layers]
    lost = next((i for i, scale in enumerate(scales) if not 1 / FACTOR < scale < FACTOR), None)
    if lost is None:
        return None
    exploding, layer, mean = scales[lost] > 1, layers[lost], scales[lost] ** (1 / lost)
    return Verdict(
        "exploding" if exploding else "vanishing",
        layer.name,
        f"The variance {'explodes' if exploding else 'vanishes'} along the depth: from {layers[0].output.variance:.3g} behind "
        f"{named(layers[0])} to {layer.output.variance:.3g} behind {named(layer)}, a factor of {mean:.2g} per layer.",
        f"The gain is too {'large' if exploding else 'small'}: multiply each layer's weights by about {mean**-0.5:.2g}, "
        "calibrate (pws.calibrate), or convert the network to PWS, whose gain preserves the variance.",
    )


def _shift(measurement: Measurement) -> Verdict | None:
    layer, lr = measurement.critical_layer, measurement.settings.lr
    if layer is None or lr is None or layer.critical_lr is None or lr < layer.critical_lr:
        return None
    free = [other for other in measurement.layers if other.counts]
    endangered = [other for other in free if other.critical_lr is not None and other.critical_lr <= lr]
    others = (
        f" {len(endangered)} of the {len(free)} layers without a norm behind them are past their critical rates."
        if len(endangered) > 1
        else ""
    )
    whole = "the network" if len(endangered) > 1 else "this layer"
    return Verdict(
        "shift",
        layer.name,
        f"At learning rate {lr:g}, one step of the average gradient adds more variance to the output of {named(layer)} than "
        f"it has: its critical learning rate is {layer.critical_lr:.3g}.{_alike(layer)}{others}",
        f"Convert {whole} to PWS, whose kernels no step can shift. Or lower the learning rate well below "
        f"{layer.critical_lr:.2g}: there a single step does the damage, and {AHEAD}",
    )


def _alike(layer: LayerDiagnosis) -> str:
    """How alike a filter's weights are pushed, if that is the reason."""
    times, part = (layer.average_gradient_ratio or 0.0) * layer.fan_in, layer.expectation_share or 0.0
    if times <= 2:
        return ""
    return (
        f" The gradients within a filter push the same way: their squared average is {times:.0f} times that of independent "
        f"gradients, and {100 * part:.0f} % of it comes from E[delta] E[xbar]."
    )


def _healthy(measurement: Measurement) -> Verdict:
    layer, lr = measurement.critical_layer, measurement.settings.lr
    if not any(other.gradient is not None for other in measurement.layers):
        return Verdict("healthy", None, "The forward pass is healthy; there was no backward pass to judge.", "")
    if layer is None:
        return Verdict(
            "healthy",
            None,
            "The forward pass is healthy, and no step can blow a layer up by shifting its filters: every trained kernel keeps "
            "its mean, or a norm follows. Steps that are too long can do harm in other ways: pws.forecast looks at the whole "
            "network.",
            "",
        )
    at = "" if lr is None else f" from one step at learning rate {lr:g}"
    return Verdict(
        "healthy",
        layer.name,
        f"No layer is in danger{at}: the smallest critical learning rate is {layer.critical_lr:.3g} ({named(layer)}). There, "
        f"one step of the average gradient doubles the layer's variance. That is about one step: {AHEAD}",
        "",
    )
