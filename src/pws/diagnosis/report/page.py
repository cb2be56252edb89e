"""The HTML page: verdict, facts, charts, table, glossary, and everything they need in the same file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files

from plotly.offline import get_plotlyjs

from pws.diagnosis.measurement import Measurement
from pws.diagnosis.report.chart import Chart
from pws.diagnosis.report.chart_plotly import plotly_figure
from pws.diagnosis.report.history_chart import over_steps
from pws.diagnosis.report.layer_charts import critical, gradient, ratio, shift, variance
from pws.diagnosis.report.page_sections import facts_section, glossary_section, verdict_section
from pws.diagnosis.report.page_table import table_section
from pws.diagnosis.verdicts import Verdict

# Nothing is fetched: what the file holds is all there is, whatever a layer is called.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
HINT = "Drag over a chart to zoom in, and double-click to zoom out. Tab and the arrow keys walk through the layers."


def page_of(measurement: Measurement, verdict: Verdict, history: Sequence[Measurement] = (), title: str = "") -> str:
    """The whole page."""
    name = escape(title or f"Diagnosis of {measurement.model}")
    charts = [draw(measurement) for draw in (variance, gradient, shift, ratio, critical)]
    charts += [over_steps(measurement, history)] if history else []
    figures = "\n".join(map(_figure, charts))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{name}</title>
<link rel="icon" href="data:,">
<style>
{_part("page.css")}</style>
</head>
<body>
<main>
<h1>{name}</h1>
{verdict_section(verdict)}
{facts_section(measurement)}
<section aria-labelledby="figures">
<h2 id="figures">Layer by layer</h2>
<p class="hint">{HINT}</p>
<noscript><p>The charts need JavaScript. The table has their numbers.</p></noscript>
{figures}
</section>
<section aria-labelledby="numbers">
<h2 id="numbers">The numbers</h2>
<div class="scroll" tabindex="0" role="region" aria-labelledby="numbers">
{table_section(measurement)}
</div>
</section>
{glossary_section()}
</main>
<script>{get_plotlyjs()}</script>
<script>
{_part("page.js")}</script>
</body>
</html>
"""


def _figure(chart: Chart) -> str:
    head = f'<figure id="{chart.id}" aria-labelledby="{chart.id}-title">\n<h3 id="{chart.id}-title">{escape(chart.title)}</h3>'
    if chart.missing:
        return f'{head}\n<p class="missing">{escape(chart.missing)}</p>\n</figure>'
    figure = plotly_figure(chart)
    # A closing tag inside a name must not end the script.
    spec = str(figure.to_json()).replace("<", "\\u003c")
    return (
        f"{head}\n<figcaption>{escape(chart.caption)}</figcaption>\n"
        f'<div class="plot" role="img" tabindex="0" aria-label="{escape(chart.label)}" '
        f'style="height:{figure.layout.height}px"></div>\n'
        f'<script type="application/json">{spec}</script>\n</figure>'
    )


def _part(name: str) -> str:
    return files("pws.diagnosis.report").joinpath(name).read_text(encoding="utf-8")
