"""The diagnosis in plain words: which layer, which cause, what to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from pws.diagnosis.diagnosis import Diagnosis
    from pws.diagnosis.layer import LayerDiagnosis

Cause = Literal[
    "healthy",
    "shift",
    "vanishing",
    "exploding",
    "dead",
    "no gradient",
    "non-finite input",
    "non-finite weight",
    "non-finite output",
    "non-finite loss",
    "non-finite gradient",
]

FACTOR: Final = 1e3
"""How far the variance may rise or fall, along the depth or since a run's start, before it counts as lost."""
HUGE: Final = 1e20
"""A mean square beyond which sums, products and exponentials overflow in float32."""
OVERFLOW_REMEDY: Final = (
    "Go back to the last finite checkpoint and lower the learning rate, or convert the network to PWS."
)
EARLIER: Final = "and training may break earlier: pws.forecast, or --forecast, looks ahead"
DEAD: Final = 0.99
"""The share of zero inputs at which a layer counts as cut off."""
RISE: Final = 0.3
"""The rise of a layer's shift share that is the cause of a collapse."""


@dataclass(frozen=True)
class Verdict:
    """Which layer, which cause, what to do."""

    cause: Cause
    layer: str | None
    finding: str
    """What was measured."""
    remedy: str
    """What to do about it."""

    def __str__(self) -> str:
        return f"{self.finding} {self.remedy}".strip()


def verdict_of(diagnosis: Diagnosis) -> Verdict:
    """The first that holds of: non-finite, dead, exploding or vanishing, shift; else healthy."""
    checks: list[Callable[[Diagnosis], Verdict | None]]
    checks = [_non_finite, _non_finite_loss, _non_finite_gradient, _dead, _no_gradient, _along_the_depth, _shift]
    return next((found for check in checks if (found := check(diagnosis)) is not None), None) or _healthy(diagnosis)


def collapse_verdict(history: Sequence[Diagnosis]) -> Verdict:
    """Of a collapse in training: all measurements in order, the last one the first unhealthy."""
    unhealthy = history[-1]
    found = _non_finite(unhealthy) or _non_finite_loss(unhealthy)
    if len(history) == 1 or (found is not None and found.cause != "non-finite output"):
        return unhealthy.verdict
    changed = _changed_since(unhealthy, history[-2]) or _changed_since(unhealthy, history[0])
    return _shift_collapse(history) or changed or unhealthy.verdict


def non_finite_after(diagnosis: Diagnosis) -> Verdict:
    """Of a model whose output or loss is not finite, although every layer's output is."""
    last = f" The last one is {_named(diagnosis.layers[-1])}." if diagnosis.layers else ""
    return Verdict(
        "non-finite output",
        None,
        f"The model's output holds NaN or infinity, and the output of every layer with a weight is finite.{last}",
        "Look at what the model does without a weight: a logarithm, root or division of zero, an exponential, a mask.",
    )


def _non_finite(diagnosis: Diagnosis) -> Verdict | None:
    layer = next((layer for layer in diagnosis.layers if not layer.finite or not layer.finite_kernel), None)
    if layer is None:
        return None
    name = _named(layer)
    if not layer.finite_kernel:
        return Verdict(
            "non-finite weight",
            layer.name,
            f"The weights of {name} hold NaN or infinity: an update before this step broke them.",
            "Go back to the last finite checkpoint and lower the learning rate.",
        )
    before = diagnosis.layers[diagnosis.layers.index(layer) - 1] if layer is not diagnosis.layers[0] else None
    if before is not None and not math.isfinite(layer.input.mean) and before.output.second_moment > HUGE:
        return Verdict(
            "non-finite output",
            before.name,
            f"What follows {_named(before)}, whose output has reached a mean square of {before.output.second_moment:.2g}, "
            f"overflows in front of {name}.",
            OVERFLOW_REMEDY,
        )
    if not math.isfinite(layer.input.mean):
        return Verdict(
            "non-finite input",
            layer.name,
            f"The input of {name} holds NaN or infinity, and no layer with a weight before it does.",
            "Mend the data, its normalization or the operation in front of the layer.",
        )
    return Verdict(
        "non-finite output",
        layer.name,
        f"The output of {name} is the first to overflow; its input has variance {layer.input.variance:.3g}.",
        OVERFLOW_REMEDY,
    )


def _non_finite_loss(diagnosis: Diagnosis) -> Verdict | None:
    if diagnosis.loss is None or math.isfinite(diagnosis.loss):
        return None
    last = diagnosis.layers[-1]
    return Verdict(
        "non-finite loss",
        None,
        f"Every layer's output is finite, and the loss is not; the output of {_named(last)}, the last layer, has a mean "
        f"square of {last.output.second_moment:.2g}.",
        "Look at the loss: its targets, a logarithm or division of zero, or outputs that are too large for it.",
    )


def _non_finite_gradient(diagnosis: Diagnosis) -> Verdict | None:
    layers = [layer for layer in diagnosis.layers if layer.gradient is not None]
    layer = next((la for la in reversed(layers) if la.gradient and not math.isfinite(la.gradient.second_moment)), None)
    if layer is None:
        return None
    return Verdict(
        "non-finite gradient",
        layer.name,
        f"The forward pass is finite, but the gradient of the output of {_named(layer)} holds NaN or infinity, and in the "
        "backward pass it is the first layer with one.",
        "Look at what follows it, the loss first: a root or logarithm of zero, a division by zero, or half precision without "
        "loss scaling do this.",
    )


def _dead(diagnosis: Diagnosis) -> Verdict | None:
    layer = next((la for la in diagnosis.layers[1:] if la.dead_inputs >= DEAD and not la.gate), None)
    if layer is None:
        return None
    return Verdict(
        "dead",
        layer.name,
        f"The units in front of {_named(layer)} are dead: {100 * layer.dead_inputs:.0f} % of its input channels are zero for "
        "the whole batch, and no gradient passes.",
        "Start again with a lower learning rate, or convert the network to PWS.",
    )


def _no_gradient(diagnosis: Diagnosis) -> Verdict | None:
    layers = [layer for layer in diagnosis.layers if layer.gradient is not None]
    if not layers or layers[0].gradient is None or layers[0].gradient.second_moment > 0:
        return None
    without = [layer for layer in layers if layer.gradient is not None and layer.gradient.second_moment == 0]
    return Verdict(
        "no gradient",
        without[-1].name,
        f"No gradient reaches {_named(without[-1])} and {len(without) - 1} of the layers before it: what follows multiplies it "
        "by zero, or the loss does not depend on it.",
        "Where a layer starts at zero on purpose (a head, the last layer of a branch), diagnose again after a step.",
    )


def _along_the_depth(diagnosis: Diagnosis) -> Verdict | None:
    """The first layer whose variance is beyond `FACTOR` of the first one's. Not judged: networks with norms, which set the
    scale anew, gates, outputs that are constant (a branch that starts at zero), and the last layer, whose scale is its own."""
    if any(layer.normalized and not layer.gate for layer in diagnosis.layers):
        return None
    layers = [layer for layer in diagnosis.layers if not layer.gate]
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
        f"{_named(layers[0])} to {layer.output.variance:.3g} behind {_named(layer)}, {mean:.2g} times a layer.",
        f"The gain is too {'large' if exploding else 'small'}: multiply each layer's weights by about {mean**-0.5:.2g}, "
        "calibrate (pws.calibrate), or convert the network to PWS, whose gain preserves the variance.",
    )


def _shift(diagnosis: Diagnosis) -> Verdict | None:
    layer, lr = diagnosis.critical_layer, diagnosis.settings.lr
    if layer is None or lr is None or layer.critical_lr is None or lr < layer.critical_lr:
        return None
    free = [other for other in diagnosis.layers if other.counts]
    endangered = [other for other in free if other.critical_lr is not None and other.critical_lr <= lr]
    times, part = (layer.average_gradient_ratio or 0.0) * layer.fan_in, layer.expectation_share or 0.0
    alike = (
        f" The gradients of a filter there push alike: their squared average is {times:.0f} times that of independent ones, "
        f"{100 * part:.0f} % of it by E[delta] E[xbar]."
    )
    others = f" {len(endangered)} of the {len(free)} layers without a norm behind them are past their critical rates."
    whole = "the network" if len(endangered) > 1 else "this layer"
    return Verdict(
        "shift",
        layer.name,
        f"At learning rate {lr:g} one step of the average gradient adds more variance to {_named(layer)} than it has: its "
        f"critical learning rate is {layer.critical_lr:.3g}."
        + (alike if times > 2 else "")
        + (others if len(endangered) > 1 else ""),
        f"Convert {whole} to PWS, whose kernels no step can shift, or lower the learning rate well below "
        f"{layer.critical_lr:.2g}: there a single step does it, {EARLIER}.",
    )


def _healthy(diagnosis: Diagnosis) -> Verdict:
    layer, lr = diagnosis.critical_layer, diagnosis.settings.lr
    if not any(other.gradient is not None for other in diagnosis.layers):
        return Verdict("healthy", None, "The forward pass is healthy; there was no backward pass to judge.", "")
    if layer is None:
        return Verdict(
            "healthy",
            None,
            "The forward pass is healthy, and no step can blow a layer up by shifting its filters: every trained kernel keeps "
            "its mean, or a norm follows. Too long steps can do harm in other ways: pws.forecast looks at the whole network.",
            "",
        )
    limit = (
        f"the smallest critical learning rate is {layer.critical_lr:.3g} ({_named(layer)}), where one step of the average "
        "gradient doubles the layer's variance"
    )
    at = "No layer is in danger" if lr is None else f"No layer is in danger from one step at learning rate {lr:g}"
    return Verdict("healthy", layer.name, f"{at}: {limit}. That is one step, {EARLIER}.", "")


def _shift_collapse(history: Sequence[Diagnosis]) -> Verdict | None:
    """If the shift share of a layer rose by `RISE`: the collapse as the work of the average gradient."""
    found = max(
        ((d.step, now, then) for d in history for now, then in _pairs(d, history[0])),
        key=lambda found: _rise(found[1], found[2]),
        default=None,
    )
    if found is None or _rise(found[1], found[2]) < RISE:
        return None
    step, now, then = found
    unhealthy, lr = history[-1], history[-1].settings.lr
    lowest = min((d.critical_lr for d in history[:-1]), default=math.inf)
    finding = (
        f"The average gradient shifted the filters of {_named(now)}: at step {step} their means made "
        f"{100 * now.shift_share:.0f} % of its variance ({100 * then.shift_share:.0f} % at the start), which went from "
        f"{then.output.variance:.2g} to {now.output.variance:.2g}."
    )
    if math.isfinite(lowest):
        finding += f" The critical learning rate before that was {lowest:.2g}" + (
            f", training ran at {lr:.3g}." if lr else "."
        )
    remedy = "Convert the network to PWS, whose kernels no step can shift, or lower the learning rate"
    if math.isfinite(lowest) and (lr is None or lowest < lr):
        remedy += f" well below {lowest:.2g}"
    return Verdict("shift", now.name, finding + _outcome(unhealthy, history[0]), f"{remedy}.")


def _rise(now: LayerDiagnosis, then: LayerDiagnosis) -> float:
    """Of the shift share; none where it can't be told."""
    rise = now.shift_share - then.shift_share
    return rise if math.isfinite(rise) else -math.inf


def _outcome(unhealthy: Diagnosis, start: Diagnosis) -> str:
    """What came of it, if that is more than the shift."""
    for now, then in _pairs(unhealthy, start):
        if not now.finite:
            return f" The output of {_named(now)} overflowed at step {unhealthy.step}."
        if now.output.variance < then.output.variance / FACTOR:
            dead = f", {100 * now.dead_inputs:.0f} % of its inputs dead" if now.dead_inputs > 0 else ""
            return (
                f" At step {unhealthy.step} the variance of {_named(now)} was gone: {now.output.variance:.2g} of "
                f"{then.output.variance:.2g}{dead}."
            )
    return ""


def _pairs(now: Diagnosis, then: Diagnosis) -> list[tuple[LayerDiagnosis, LayerDiagnosis]]:
    """Each layer now and then, but for gates."""
    before = {layer.name: layer for layer in then.layers if not layer.gate}
    return [(layer, before[layer.name]) for layer in now.layers if layer.name in before]


def _changed_since(unhealthy: Diagnosis, before: Diagnosis) -> Verdict | None:
    """The first layer whose output variance has risen or fallen beyond `FACTOR`, without a shift."""
    then = {layer.name: layer.output.variance for layer in before.layers if layer.output.variance > 0}
    for layer in unhealthy.layers:
        change = layer.output.variance / then.get(layer.name, math.nan)
        if layer.finite and (layer.gate or not (change <= 1 / FACTOR or change >= FACTOR)):
            continue
        exploding = not layer.finite or change > 1
        since = f"step {before.step}" if before.step is not None else "the start"
        return Verdict(
            "exploding" if exploding else "vanishing",
            layer.name,
            f"The variance of {_named(layer)} {'exploded' if exploding else 'vanished'}: "
            f"{then.get(layer.name, 0.0):.2g} at {since}, "
            f"{'not finite' if not layer.finite else format(layer.output.variance, '.2g')} at step {unhealthy.step}; no "
            f"layer's shift share rose by {100 * RISE:.0f} points"
            + (f", and {100 * layer.dead_inputs:.0f} % of its inputs are dead." if layer.dead_inputs > 0.5 else "."),
            "The steps were too long: lower the learning rate, or bound the step (clip the gradient to norm 0.1 / lr).",
        )
    return None


def _named(layer: LayerDiagnosis) -> str:
    return f"{layer.name!r}"
