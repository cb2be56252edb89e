"""The parts of the page that are words: verdict, facts, glossary."""

from __future__ import annotations

from html import escape

from pws.diagnosis.measurement import Measurement
from pws.diagnosis.report.number_format import listed, number
from pws.diagnosis.report.remarks import layers_by_note
from pws.diagnosis.verdicts import Verdict

SIGNS = {
    True: '<circle cx="12" cy="12" r="10"/><path d="M7.5 12.5l3 3 6-6.5"/>',
    False: '<path d="M12 2.8L22.2 20.6H1.8z"/><path d="M12 9.5v5.2M12 17.3v.4"/>',
}
"""A tick in a circle, an exclamation mark in a triangle."""

GLOSSARY = {
    "Fan-in, n": (
        "The number of weights in a filter; a filter is the part of a layer's weight that makes one output channel."
    ),
    "Variance": "The variance of a layer's input or output over the batch and all positions, as a mean over the channels.",
    "Variance transmission": (
        "Var(out) / Var(in) of a layer. A deep network needs it near 1, or the signal dies or explodes."
    ),
    "Centred part, shift part": (
        "A filter is its mean m and what is left without it. The output is y = z + nm x̄ + bias: z is what the "
        "centred filter makes of the input, x̄ the mean of the patch it looks at. Var(z) is the centred part, (nm)² "
        "Var(x̄) the shift part of the output's variance."
    ),
    "Shift share": "shift part / (shift part + centred part), from 0 to 100 %.",
    "Output gradient, δ": "The gradient of the loss by a layer's output, dL/dy.",
    "Average gradient": (
        "The mean of the loss's gradient over a filter's weights: what moves the filter's mean. Over N positions it "
        "is N E[δ] E[x̄] + N Cov(δ, x̄); after a ReLU x̄ is positive, and the first term pushes all weights of a "
        "filter alike."
    ),
    "Average-gradient ratio": (
        "(Σ s)² / (n Σ s²) of a filter's step s: 1 if all weights are pushed alike, about 1/n if their gradients were"
        " independent, 0 if the layer is standardized."
    ),
    "Critical learning rate (LR)": (
        "The learning rate at which one step of plain SGD moves the filters' means so far that they add as much variance as "
        "the output has. For a network it is the smallest of the layers that no norm follows, without the gates."
    ),
    "Standardized layer": (
        "One that convolves with a kernel whose mean is taken away and whose variance is fixed, as in Parametric "
        "Weights Standardization (PWS): no step can shift it."
    ),
}


def verdict_section(found: Verdict) -> str:
    """The verdict in a box, told by a sign and a word and not by colour alone."""
    healthy = found.cause == "healthy"
    layer = "" if healthy or found.layer is None else f" in <code>{escape(found.layer)}</code>"
    remedy = f'<p class="remedy">{escape(found.remedy)}</p>' if found.remedy else ""
    return (
        f'<section class="verdict {"healthy" if healthy else "unhealthy"}" aria-label="Verdict">\n'
        f'<p class="cause"><svg viewBox="0 0 24 24" aria-hidden="true">{SIGNS[healthy]}</svg>'
        f"<span>{escape(found.cause.capitalize())}{layer}</span></p>\n"
        f'<p class="finding">{escape(found.finding)}</p>\n{remedy}</section>'
    )


def facts_section(measurement: Measurement) -> str:
    """What was diagnosed."""
    rows = "".join(
        f"<div><dt>{escape(word)}</dt><dd>{escape(value)}</dd></div>" for word, value in _fact_rows(measurement)
    )
    return f'<dl class="facts">{rows}</dl>'


def _fact_rows(measurement: Measurement) -> list[tuple[str, str]]:
    s = measurement.settings
    found = [("Model", measurement.model), ("Layers", str(len(measurement.layers))), ("Loss", number(measurement.loss))]
    if measurement.step is not None:
        found.append(("Training step", f"{measurement.step:,}"))
    found += [("Batch positions", _positions(measurement)), ("Mode", "training" if s.training else "evaluation")]
    if s.lr is not None:
        found += [("LR judged", f"{s.lr:g}"), ("Momentum", f"{s.momentum:g}"), ("Steps ahead", str(s.steps))]
    if measurement.unused:
        found.append(("Did not run", listed(measurement.unused)))
    return [*found, *(("Note", f"{note}: {listed(names)}") for note, names in layers_by_note(measurement).items())]


def _positions(measurement: Measurement) -> str:
    counts = [layer.positions for layer in measurement.layers] or [0]
    low, high = min(counts), max(counts)
    return f"{low:,} to {high:,} per channel" if low < high else f"{low:,} per channel"


def glossary_section() -> str:
    """The words of the page."""
    rows = "\n".join(f"<dt>{escape(word)}</dt><dd>{escape(meaning)}</dd>" for word, meaning in GLOSSARY.items())
    return f'<section aria-labelledby="words">\n<h2 id="words">Words</h2>\n<dl class="glossary">\n{rows}\n</dl>\n</section>'
