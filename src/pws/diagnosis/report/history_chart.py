"""The chart over training steps, from what a `Monitor` measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pws.diagnosis.measurement import Measurement
from pws.diagnosis.report.axis import SHARES, linear_axis, log_axis
from pws.diagnosis.report.chart import Chart, Look, Plot, Series
from pws.diagnosis.report.layer_charts import ENDLESS
from pws.diagnosis.report.number_format import number, percent


def over_steps(measurement: Measurement, history: Sequence[Measurement]) -> Chart:
    """Largest shift share, the network's critical learning rate and the loss, one above the other."""
    steps = [index if one.step is None else one.step for index, one in enumerate(history)]
    shares, rates, losses = [_share(d) for d in history], [_rate(d) for d in history], [d.loss for d in history]
    positive = all(loss is None or not loss <= 0 for loss in losses)
    share = Series("largest shift share", shares, Look("shift", "diamond", "solid"))
    rate = Series("the network's critical LR", rates, Look("output", "circle", "solid"), {"infinite": ENDLESS})
    loss = Series("loss", losses, Look("centred", "square", "solid"))
    return Chart(
        "fig-history",
        "Over the training steps",
        "The largest shift share, the smallest critical LR of any layer, and the loss. A collapse announces itself before the "
        "loss shows it: the share rises, and the critical LR falls below the LR of the training."
        + ("" if measurement.step is None else f" The dotted line is step {measurement.step}, explained above."),
        f"Chart of {len(history)} diagnoses, steps {min(steps)} to {max(steps)}. Largest shift share: {percent(shares[0])} "
        f"first, {percent(shares[-1])} last. Critical learning rate: {number(rates[0])} first, {number(rates[-1])} last. "
        f"Loss: {number(losses[0])} first, {number(losses[-1])} last.",
        xs=steps,
        hovers=[_hover(*row) for row in zip(steps, shares, rates, losses, strict=True)],
        plots=(
            Plot("shift share", SHARES, (share,), percent=True),
            Plot("critical LR", log_axis(rates), (rate,)),
            Plot("loss", (log_axis if positive else linear_axis)(losses), (loss,)),
        ),
        step=measurement.step,
    )


def _share(measurement: Measurement) -> float | None:
    """The largest shift share; NaN if no layer's is a number."""
    shares = [layer.shift_share for layer in measurement.layers]
    return max((share for share in shares if math.isfinite(share)), default=math.nan)


def _rate(measurement: Measurement) -> float | None:
    """The network's critical learning rate; None where no layer's was measured, NaN where none is a number."""
    rates = [layer.critical_lr for layer in measurement.layers if layer.critical_lr is not None]
    if rates and all(math.isnan(rate) for rate in rates):
        return math.nan
    return measurement.critical_lr if rates else None


def _hover(step: float, share: float | None, rate: float | None, loss: float | None) -> list[str]:
    return [
        f"step {step}",
        f"largest shift share: {percent(share)}",
        f"critical LR: {number(rate)}",
        f"loss: {number(loss)}",
    ]
