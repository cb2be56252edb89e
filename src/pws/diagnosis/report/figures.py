"""The figures of the page. Each is a panel: plotly's figure, or the sentence that says why there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from plotly import graph_objects as go

from pws.diagnosis.diagnosis import Diagnosis
from pws.diagnosis.layer import LayerDiagnosis
from pws.diagnosis.report.drawing import Look, depth_drawing, hover, level, value_axis
from pws.diagnosis.report.marks import SHARES, log_axis
from pws.diagnosis.report.words import ENDLESS, danger, lr_words, number, percent, ratio_of, shift_of, why_no_backward

INPUT = Look("var(--input)", "circle-open", "dot")
OUTPUT = Look("var(--output)", "circle", "solid", 8)
CENTRED = Look("var(--centred)", "square", "dash", 6)
SHIFT = Look("var(--shift)", "diamond", "dashdot")
NOW = Look("var(--output)", bars=True)
LATER = Look("var(--shift)", "diamond-open", size=9)
GRADIENT = Look("var(--output)", "circle", "solid")
RATIO = Look("var(--output)", size=8)
INDEPENDENT = Look("var(--shift)", "line-ew-open", size=10)
SAFE = Look("var(--output)", size=8)
UNSAFE = Look("var(--shift)", "diamond", size=10)
NORMALIZED = Look("var(--input)", "circle-open", size=8)


@dataclass(frozen=True)
class Panel:
    """A figure of the page."""

    id: str
    title: str
    caption: str
    """How to read it."""
    label: str
    """What a screen reader says."""
    figure: go.Figure | None = None
    missing: str = ""
    """Why there is no figure."""


def panels_of(diagnosis: Diagnosis, history: Sequence[Diagnosis] = ()) -> list[Panel]:
    """All of them, in the page's order."""
    found = [variance(diagnosis), gradient(diagnosis), shift(diagnosis), ratio(diagnosis), critical(diagnosis)]
    if history:
        from pws.diagnosis.report.over_time import over_time

        found.append(over_time(diagnosis, history))
    return found


def variance(diagnosis: Diagnosis) -> Panel:
    """What each layer makes of its input's variance, and what its filters' means add."""
    layers = diagnosis.layers
    texts = [
        hover(
            layer,
            Var_in=number(layer.input.variance),
            Var_out=number(layer.output.variance),
            transmission=number(layer.transmission),
            centred_part=number(layer.centred),
            shift_part=number(layer.shift),
        )
        for layer in layers
    ]
    drawing = depth_drawing(layers, texts)
    series = {
        "Var in": ([layer.input.variance for layer in layers], INPUT),
        "Var out": ([layer.output.variance for layer in layers], OUTPUT),
        "centred part of Var out": ([layer.centred for layer in layers], CENTRED),
        "shift part of Var out": ([shift_of(layer) for layer in layers], SHIFT),
    }
    axis = log_axis([value for values, _ in series.values() for value in values])
    for name, (values, look) in series.items():
        drawing.series(name, values, axis, look)
    value_axis(drawing.figure, "variance", axis=axis)
    return Panel(
        "fig-variance",
        "Variance along the depth, forward",
        "A network that transmits variance keeps Var out level from left to right; in Var(y) = Var(z) + (nm)² Var(x̄) + "
        "2nm Cov(z, x̄) the first term is the centred part, which the filters make when their mean m is taken away, and the "
        "second the shift part, which their mean adds.",
        f"{_along(layers)}: variance of each layer's input and output and of the output's two parts, logarithmic. "
        f"{_span('Output variance', [layer.output.variance for layer in layers])}",
        drawing.figure,
    )


def gradient(diagnosis: Diagnosis) -> Panel:
    """The same backward."""
    layers = diagnosis.layers
    values = [None if layer.gradient is None else layer.gradient.variance for layer in layers]
    panel = Panel(
        "fig-gradient",
        "Variance of the output gradient, backward",
        "Read it from right to left, as the gradient travels: a level Var(δ), δ = dL/dy, says that no gradient "
        "vanishes or explodes.",
        f"{_along(layers)}: variance of the gradient of each layer's output, logarithmic. {_span('Variance', values)}",
    )
    if all(value is None for value in values):
        return replace(panel, missing=f"Not drawn: {why_no_backward(diagnosis)}.")
    texts = [
        hover(layer, Var_δ=number(value), through_the_layer=number(layer.gradient_transmission))
        for layer, value in zip(layers, values, strict=True)
    ]
    drawing = depth_drawing(layers, texts)
    axis = log_axis(values)
    drawing.series("Var(δ)", values, axis, GRADIENT)
    value_axis(drawing.figure, "variance of dL/dy", axis=axis)
    return replace(panel, figure=drawing.figure)


def shift(diagnosis: Diagnosis) -> Panel:
    """How much of each layer's output its filters' means make, now and after some steps."""
    layers, later = diagnosis.layers, diagnosis.predicted_shift_shares()
    now = [layer.shift_share for layer in layers]
    word = "" if diagnosis.settings.lr is None else f"after {lr_words(diagnosis)}"
    texts = [
        hover(layer, shift_share_now=percent(layer.shift_share), **({word: percent(share)} if word else {}))
        for layer, share in zip(layers, later, strict=True)
    ]
    drawing = depth_drawing(layers, texts)
    drawing.series("now", now, SHARES, NOW)
    drawing.series(word, later, SHARES, LATER)
    value_axis(drawing.figure, "shift share", axis=SHARES, tickformat=".0%")
    forecast = f"; diamonds: {word}, if today's average step goes on" if any(s is not None for s in later) else ""
    lacking = f" No forecast: {why_no_backward(diagnosis)}." if word and not forecast else ""
    return Panel(
        "fig-shift",
        "Shift share",
        "How much of a layer's output variance its filters' means make, (nm)² Var(x̄) / ((nm)² Var(x̄) + Var(z)): near 0 % the "
        f"signal is what the centred filters see, near 100 % it is only the shift{forecast}.{lacking}",
        f"{_along(layers)}: shift share of each layer in percent. {_span('Now', now, percent)}",
        drawing.figure,
    )


def ratio(diagnosis: Diagnosis) -> Panel:
    """How alike a gradient step pushes a filter's weights."""
    layers = diagnosis.layers
    values = [ratio_of(layer) for layer in layers]
    panel = Panel(
        "fig-ratio",
        "Average-gradient ratio against 1/n",
        "Of the step s of a filter's n weights, (Σ s)² / (n Σ s²): 1 if all are pushed alike, 1/n (dashes) if their gradients "
        "were independent, and 0 in a standardized layer, whose mean no step can shift.",
        f"{_along(layers)}: average-gradient ratio of each layer and the 1/n of independent gradients, logarithmic. "
        f"{_span('Ratio', values)}",
    )
    if all(value is None for value in values):
        return replace(panel, missing=f"Not drawn: {why_no_backward(diagnosis)}.")
    texts = [_ratio_text(layer) for layer in layers]
    drawing = depth_drawing(layers, texts)
    expected = [layer.independent_ratio for layer in layers]
    axis = log_axis([*values, *expected])
    drawing.series("average-gradient ratio", values, axis, RATIO, zero="0: no step can shift the mean")
    drawing.series("1/n: independent gradients", expected, axis, INDEPENDENT)
    value_axis(drawing.figure, "ratio", axis=axis)
    return replace(panel, figure=drawing.figure)


def _ratio_text(layer: LayerDiagnosis) -> str:
    value = layer.average_gradient_ratio
    return hover(
        layer,
        ratio=number(value),
        **{
            "1/n": number(layer.independent_ratio),
            "ratio × n": number(None if value is None else value * layer.fan_in),
        },
        part_of_E_δ_E_x̄=percent(layer.expectation_share),
    )


def critical(diagnosis: Diagnosis) -> Panel:
    """The learning rate that each layer bears."""
    layers, lr = diagnosis.layers, diagnosis.settings.lr
    values = [layer.critical_lr for layer in layers]
    line = "" if lr is None else f", here every diamond (line: {lr:g}),"
    panel = Panel(
        "fig-critical",
        "Critical learning rate",
        "The LR at which one step moves the filters' means so far that they add as much variance as the output has, √(Var(y) / "
        f"mean((ns̄)² Var(x̄))), for plain SGD: a layer whose critical LR is below the one trained with{line} is at risk "
        "unless a norm follows it or it is a gate (open circles); infinite: no step can shift it.",
        f"{_along(layers)}: critical learning rate of each layer, logarithmic. {_span('Critical LR', values)}"
        + ("" if lr is None else f" The learning rate judged is {lr:g}."),
    )
    if all(value is None for value in values):
        return replace(panel, missing=f"Not drawn: {why_no_backward(diagnosis)}.")
    drawing = depth_drawing(layers, [_critical_text(layer, lr) for layer in layers])
    axis = log_axis([*values, lr])
    for name, kept, look in (
        ("critical LR", "safe", SAFE),
        ("critical LR, at or below the one judged", "unsafe", UNSAFE),
        ("critical LR, a norm follows, or a gate", "normalized", NORMALIZED),
    ):
        chosen = [value if danger(layer, lr) == kept else None for layer, value in zip(layers, values, strict=True)]
        drawing.series(name, chosen, axis, look, infinite=ENDLESS, zero="0: nothing comes out")
    if lr is not None:
        level(drawing.figure, lr, f"LR judged: {lr:g}")
    value_axis(drawing.figure, "learning rate", axis=axis)
    return replace(panel, figure=drawing.figure)


def _critical_text(layer: LayerDiagnosis, lr: float | None) -> str:
    value = layer.critical_lr
    endless = value == float("inf")
    return hover(
        layer,
        critical_LR=ENDLESS if endless else number(value),
        LR_judged="" if lr is None else f"{lr:g}",
    )


def _along(layers: Sequence[LayerDiagnosis]) -> str:
    return f"Chart over {len(layers)} layers in execution order" if len(layers) > 1 else "Chart of one layer"


def _span(what: str, values: Sequence[float | None], word: Callable[[float | None], str] = number) -> str:
    found = [value for value in values if value is not None]
    return f"{what}: {word(found[0])} in the first layer, {word(found[-1])} in the last." if found else ""
