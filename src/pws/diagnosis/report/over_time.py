"""The figure over training steps, from the diagnoses that a `Monitor` took."""

from __future__ import annotations

import math
from collections.abc import Sequence

from plotly.subplots import make_subplots

from pws.diagnosis.diagnosis import Diagnosis
from pws.diagnosis.report.drawing import Drawing, Look, step_drawing, value_axis
from pws.diagnosis.report.figures import Panel
from pws.diagnosis.report.marks import SHARES, Axis, linear_axis, log_axis
from pws.diagnosis.report.words import ENDLESS, number, percent

SHARE = Look("var(--shift)", "diamond", "solid")
CRITICAL = Look("var(--output)", "circle", "solid")
LOSS = Look("var(--centred)", "square", "solid")


def over_time(diagnosis: Diagnosis, history: Sequence[Diagnosis]) -> Panel:
    """Largest shift share, the network's critical learning rate and the loss, one above the other."""
    steps = [index if one.step is None else one.step for index, one in enumerate(history)]
    shares, rates, losses = [_share(d) for d in history], [_rate(d) for d in history], [d.loss for d in history]
    rows = zip(steps, shares, rates, losses, strict=True)
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.07)
    drawing = step_drawing(figure, steps, [_text(*row) for row in rows])
    drawing.series("largest shift share", shares, SHARES, SHARE)
    positive = all(loss is None or not loss <= 0 for loss in losses)
    rate_axis, loss_axis = log_axis(rates), (log_axis if positive else linear_axis)(losses)
    drawing.series("the network's critical LR", rates, rate_axis, CRITICAL, row=2, infinite=ENDLESS)
    drawing.series("loss", losses, loss_axis, LOSS, row=3)
    _axes(drawing, diagnosis, rate_axis, loss_axis)
    return Panel(
        "fig-history",
        "Over the training steps",
        "The largest shift share and the smallest critical LR of any layer, and the loss: a collapse announces itself by a "
        "rising share and a critical LR that falls below the one trained with, before the loss shows it"
        + ("" if diagnosis.step is None else f"; the dotted line is step {diagnosis.step}, explained above")
        + ".",
        f"Chart of {len(history)} diagnoses, steps {min(steps)} to {max(steps)}. Largest shift share: {percent(shares[0])} "
        f"first, {percent(shares[-1])} last. Critical learning rate: {number(rates[0])} first, {number(rates[-1])} last. "
        f"Loss: {number(losses[0])} first, {number(losses[-1])} last.",
        figure,
    )


def _axes(drawing: Drawing, diagnosis: Diagnosis, *axes: Axis) -> None:
    figure = drawing.figure
    value_axis(figure, "shift share", axis=SHARES, tickformat=".0%", row=1, col=1)
    value_axis(figure, "critical LR", axis=axes[0], row=2, col=1)
    value_axis(figure, "loss", axis=axes[1], row=3, col=1)
    figure.update_xaxes(title={"text": "training step", "standoff": 6}, row=3, col=1)
    if diagnosis.step is not None:
        figure.add_vline(x=diagnosis.step, line={"color": "var(--ink)", "width": 1.5, "dash": "dot"})


def _share(diagnosis: Diagnosis) -> float | None:
    """The largest; NaN if it is nowhere a number."""
    shares = [layer.shift_share for layer in diagnosis.layers]
    return max((share for share in shares if math.isfinite(share)), default=math.nan)


def _rate(diagnosis: Diagnosis) -> float | None:
    """The network's critical learning rate; None where no layer's was measured, NaN where none is a number."""
    rates = [layer.critical_lr for layer in diagnosis.layers if layer.critical_lr is not None]
    if rates and all(math.isnan(rate) for rate in rates):
        return math.nan
    return diagnosis.critical_lr if rates else None


def _text(step: float, share: float | None, rate: float | None, loss: float | None) -> str:
    rows = (
        f"largest shift share: {percent(share)}",
        f"critical LR: {number(rate)}",
        f"loss: {number(loss)}",
    )
    return "<br>".join([f"<b>step {step}</b>", *rows])
