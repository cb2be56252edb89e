"""The charts over the layers, in execution order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pws.diagnosis.layer import LayerDiagnosis
from pws.diagnosis.measurement import Measurement
from pws.diagnosis.report.axis import SHARES, log_axis
from pws.diagnosis.report.chart import Chart, Look, Plot, Series
from pws.diagnosis.report.number_format import number, percent, shape, short
from pws.diagnosis.report.remarks import judged_steps, remark_on, why_no_backward

ROUNDING = 1e-10
"""A shift share below it is 0: n eps² of float32 at a fan-in n of 5000."""
ENDLESS = "infinite: no step can shift it"


def main_charts(measurement: Measurement) -> list[Chart]:
    """The charts of a static picture."""
    return [variance(measurement), shift(measurement), ratio(measurement), critical(measurement)]


def variance(measurement: Measurement) -> Chart:
    """What each layer makes of its input's variance, and what its filters' means add."""
    layers = measurement.layers
    series = (
        Series("Var in", [layer.input.variance for layer in layers], Look("input", "circle-open", "dot")),
        Series("Var out", [layer.output.variance for layer in layers], Look("output", "circle", "solid", 8)),
        Series("centred part of Var out", [layer.centred for layer in layers], Look("centred", "square", "dash", 6)),
        Series("shift part of Var out", [_shift_part(layer) for layer in layers], Look("shift", "diamond", "dashdot")),
    )
    return _over_layers(
        measurement,
        "fig-variance",
        "Variance along the depth: level is good",
        "In a network that transmits variance, Var out stays level from left to right. Var(y) = Var(z) + (nm)² Var(x̄) + "
        "2nm Cov(z, x̄): the first term is the centred part, which the filters make without their mean m. The second term is "
        "the shift part, which their mean adds.",
        "variance of each layer's input and output and of the output's two parts, logarithmic. "
        + _span("Output variance", series[1].values),
        [
            {
                "Var in": number(layer.input.variance),
                "Var out": number(layer.output.variance),
                "transmission": number(layer.transmission),
                "centred part": number(layer.centred),
                "shift part": number(layer.shift),
            }
            for layer in layers
        ],
        Plot("variance", log_axis([value for one in series for value in one.values]), series),
    )


def gradient(measurement: Measurement) -> Chart:
    """The variance of each layer's output gradient."""
    layers = measurement.layers
    values = [None if layer.gradient is None else layer.gradient.variance for layer in layers]
    return _over_layers(
        measurement,
        "fig-gradient",
        "Variance of the output gradient: level is good",
        "Read it from right to left, as the gradient travels. If Var(δ), δ = dL/dy, is level, no gradient vanishes or "
        "explodes.",
        f"variance of the gradient of each layer's output, logarithmic. {_span('Variance', values)}",
        [
            {"Var δ": number(value), "through the layer": number(layer.gradient_transmission)}
            for layer, value in zip(layers, values, strict=True)
        ],
        Plot("variance of dL/dy", log_axis(values), (Series("Var(δ)", values, Look("output", "circle", "solid")),)),
    )


def shift(measurement: Measurement) -> Chart:
    """How much of each layer's output variance its filters' means make, now and after some steps."""
    layers, later = measurement.layers, measurement.predicted_shift_shares()
    now = [layer.shift_share for layer in layers]
    word = "" if measurement.settings.lr is None else f"after {judged_steps(measurement)}"
    forecast = ""
    if any(share is not None for share in later):
        forecast = f" Diamonds: {word}, if today's average step goes on."
    elif word:
        forecast = f" No forecast: {why_no_backward(measurement)}."
    series = (
        Series("now", now, Look("output", bars=True)),
        Series(word, later, Look("shift", "diamond-open", size=9)),
    )
    return _over_layers(
        measurement,
        "fig-shift",
        "Shift share: what the filters' means make of the variance",
        "The share of a layer's output variance that its filters' means make, (nm)² Var(x̄) / ((nm)² Var(x̄) + Var(z)). Near "
        f"0 %, the signal is what the centred filters see. Near 100 %, it is only the shift.{forecast}",
        f"shift share of each layer in percent. {_span('Now', now, percent)}",
        [
            {"shift share now": percent(layer.shift_share), **({word: percent(share)} if word else {})}
            for layer, share in zip(layers, later, strict=True)
        ],
        Plot("shift share", SHARES, series, percent=True),
    )


def ratio(measurement: Measurement) -> Chart:
    """How alike a gradient step pushes a filter's weights."""
    layers = measurement.layers
    values, expected = [_ratio(layer) for layer in layers], [layer.independent_ratio for layer in layers]
    series = (
        Series("average-gradient ratio", values, Look("output", size=8), {"zero": "0: no step can shift the mean"}),
        Series("1/n: independent gradients", expected, Look("shift", "line-ew-open", size=10)),
    )
    return _over_layers(
        measurement,
        "fig-ratio",
        "Average-gradient ratio: 1 if a step pushes all weights alike",
        "(Σ s)² / (n Σ s²), for the step s of a filter's n weights. It is 1 if all are pushed alike, and 1/n (dashes) if their "
        "gradients are independent. It is 0 in a standardized layer, whose mean no step can shift.",
        "average-gradient ratio of each layer and the 1/n of independent gradients, logarithmic. "
        + _span("Ratio", values),
        [_ratio_numbers(layer) for layer in layers],
        Plot("ratio", log_axis([*values, *expected]), series),
        values,
    )


def critical(measurement: Measurement) -> Chart:
    """The learning rate at which one step doubles each layer's variance."""
    layers, lr = measurement.layers, measurement.settings.lr
    values = [layer.critical_lr for layer in layers]
    series = tuple(
        Series(
            name,
            [value if _danger(layer, lr) == kept else None for layer, value in zip(layers, values, strict=True)],
            look,
            {"infinite": ENDLESS, "zero": "0: nothing comes out"},
        )
        for kept, name, look in (
            ("safe", "critical LR", Look("output", size=8)),
            ("unsafe", "critical LR, at or below the one judged", Look("shift", "diamond", size=10)),
            ("normalized", "critical LR, a norm follows, or a gate", Look("input", "circle-open", size=8)),
        )
    )
    judged = "" if lr is None else f" (here every diamond; the line is {lr:g})"
    return _over_layers(
        measurement,
        "fig-critical",
        "Critical learning rate: one step there doubles the variance",
        "The LR at which one step of plain SGD moves the filters' means so far that they add as much variance as the output "
        f"has, √(Var(y) / mean((ns̄)² Var(x̄))). A layer is at risk if its critical LR is below the LR of the training{judged}. "
        "Open circles are not at risk: a norm follows the layer, or it is a gate. Infinite: no step can shift the layer.",
        f"critical learning rate of each layer, logarithmic. {_span('Critical LR', values)}"
        + ("" if lr is None else f" The learning rate judged is {lr:g}."),
        [
            {
                "critical LR": ENDLESS if layer.critical_lr == float("inf") else number(layer.critical_lr),
                "LR judged": "" if lr is None else f"{lr:g}",
            }
            for layer in layers
        ],
        Plot(
            "learning rate", log_axis([*values, lr]), series, level=None if lr is None else (lr, f"LR judged: {lr:g}")
        ),
    )


def _over_layers(
    measurement: Measurement,
    id: str,
    title: str,
    caption: str,
    shown: str,
    numbers: Sequence[dict[str, str]],
    plot: Plot,
    values: Sequence[float | None] | None = None,
) -> Chart:
    """A chart of one plot; `values` are those without which there is nothing to draw, by default those of all series."""
    layers = measurement.layers
    needed = [value for one in plot.series for value in one.values] if values is None else values
    drawn = any(value is not None for value in needed)
    along = f"Chart over {len(layers)} layers in execution order" if len(layers) > 1 else "Chart of one layer"
    return Chart(
        id,
        title,
        caption,
        f"{along}: {shown}",
        xs=list(range(len(layers))),
        hovers=[_hover(layer, lines) for layer, lines in zip(layers, numbers, strict=True)],
        plots=(plot,) if drawn else (),
        names=[short(layer.name) for layer in layers],
        missing="" if drawn else f"Not drawn: {why_no_backward(measurement)}.",
    )


def _hover(layer: LayerDiagnosis, numbers: dict[str, str]) -> list[str]:
    rows = [f"{word}: {value}" for word, value in numbers.items() if value]
    remark = [remark_on(layer)] if remark_on(layer) else []
    return [layer.name or "(unnamed)", f"{layer.kind}, kernel {shape(layer)}", *rows, *remark]


def _shift_part(layer: LayerDiagnosis) -> float:
    """The shift part of the variance; 0 where it is but what rounding leaves of a kernel whose mean is 0.

    Otherwise a standardized layer would stretch a logarithmic axis over ten decades of nothing.
    """
    return 0.0 if layer.shift_share < ROUNDING else layer.shift


def _ratio(layer: LayerDiagnosis) -> float | None:
    """The average-gradient ratio; 0 where no filter's average step is more than rounding."""
    step = layer.filters.average_step
    return layer.average_gradient_ratio if step is None or step.any() else 0.0


def _ratio_numbers(layer: LayerDiagnosis) -> dict[str, str]:
    value = layer.average_gradient_ratio
    return {
        "ratio": number(value),
        "1/n": number(layer.independent_ratio),
        "ratio × n": number(None if value is None else value * layer.fan_in),
        "part of E δ E x̄": percent(layer.expectation_share),
    }


def _danger(layer: LayerDiagnosis, lr: float | None) -> str:
    """What the judged rate is to a layer: `safe`, `unsafe`, or `normalized`: no step can blow it up, or it is a gate."""
    if not layer.counts:
        return "normalized"
    return "unsafe" if lr is not None and layer.critical_lr is not None and layer.critical_lr <= lr else "safe"


def _span(what: str, values: Sequence[float | None], word: Callable[[float | None], str] = number) -> str:
    found = [value for value in values if value is not None]
    return f"{what}: {word(found[0])} in the first layer, {word(found[-1])} in the last." if found else ""
