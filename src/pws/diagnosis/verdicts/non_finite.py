"""Verdicts on NaN and infinity: where they came first."""

from __future__ import annotations

import math
from typing import Final

from pws.diagnosis.layer import LayerDiagnosis
from pws.diagnosis.measurement import Measurement
from pws.diagnosis.verdicts.verdict import Verdict, named

HUGE: Final = 1e20
"""A mean square beyond which sums, products and exponentials overflow in float32."""
OVERFLOW_REMEDY: Final = (
    "Go back to the last finite checkpoint and lower the learning rate, or convert the network to PWS."
)


def non_finite_layer(measurement: Measurement) -> Verdict | None:
    """The first layer whose weights, input or output are not finite."""
    layers = measurement.layers
    index = next((i for i, layer in enumerate(layers) if not layer.finite or not layer.finite_kernel), None)
    if index is None:
        return None
    layer, before = layers[index], layers[index - 1] if index else None
    if not layer.finite_kernel:
        return Verdict(
            "non-finite weight",
            layer.name,
            f"The weights of {named(layer)} hold NaN or infinity: an update before this step broke them.",
            "Go back to the last finite checkpoint and lower the learning rate.",
        )
    if not math.isfinite(layer.input.mean):
        return _non_finite_input(layer, before)
    return Verdict(
        "non-finite output",
        layer.name,
        f"The output of {named(layer)} is the first to overflow; its input has variance {layer.input.variance:.3g}.",
        OVERFLOW_REMEDY,
    )


def _non_finite_input(layer: LayerDiagnosis, before: LayerDiagnosis | None) -> Verdict:
    if before is not None and before.output.second_moment > HUGE:
        return Verdict(
            "non-finite output",
            before.name,
            f"An operation between {named(before)} and {named(layer)} overflows: the output of {named(before)} has reached a "
            f"mean square of {before.output.second_moment:.2g}.",
            OVERFLOW_REMEDY,
        )
    return Verdict(
        "non-finite input",
        layer.name,
        f"The input of {named(layer)} holds NaN or infinity, and the output of every layer before it is finite.",
        "Check the data, its normalization and the operation in front of this layer.",
    )


def non_finite_loss(measurement: Measurement) -> Verdict | None:
    """A loss that is not finite although the output of every layer is."""
    if measurement.loss is None or math.isfinite(measurement.loss):
        return None
    last = (
        f" The output of the last layer, {named(measurement.layers[-1])}, has a mean square of "
        f"{measurement.layers[-1].output.second_moment:.2g}."
        if measurement.layers
        else ""
    )
    return Verdict(
        "non-finite loss",
        None,
        f"The output of every layer is finite, but the loss is not.{last}",
        "Check the loss: its targets, a logarithm or division of zero, or outputs that are too large for it.",
    )


def non_finite_gradient(measurement: Measurement) -> Verdict | None:
    """The first layer of the backward pass whose output gradient is not finite."""
    layers = [layer for layer in measurement.layers if layer.gradient is not None]
    layer = next((la for la in reversed(layers) if la.gradient and not math.isfinite(la.gradient.second_moment)), None)
    if layer is None:
        return None
    return Verdict(
        "non-finite gradient",
        layer.name,
        f"The forward pass is finite, but the gradient of the output of {named(layer)} holds NaN or infinity. No layer has "
        "one earlier in the backward pass.",
        "Check what follows this layer, the loss first. Likely causes: a root or logarithm of zero, a division by zero, or "
        "half precision without loss scaling.",
    )


def non_finite_after(measurement: Measurement) -> Verdict:
    """A model whose output or loss is not finite, although the output of every layer is."""
    last = f" The last one is {named(measurement.layers[-1])}." if measurement.layers else ""
    return Verdict(
        "non-finite output",
        None,
        f"The model's output holds NaN or infinity, and the output of every layer with a weight is finite.{last}",
        "Check what the model computes without a weight: a logarithm, root or division of zero, an exponential, a mask.",
    )
