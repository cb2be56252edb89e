"""The HTML page: verdict, facts, figures, table, glossary, and everything they need in the same file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files

from plotly.offline import get_plotlyjs

from pws.diagnosis.diagnosis import Diagnosis
from pws.diagnosis.report.figures import Panel, panels_of
from pws.diagnosis.report.listing import listing
from pws.diagnosis.report.prose import facts, glossary, verdict

# Nothing is fetched: what the file holds is all there is, whatever a layer is called.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
MODEBAR = "Drag over a figure to zoom in, double-click to zoom out; Tab and the arrow keys walk through the layers."


def page_of(diagnosis: Diagnosis, history: Sequence[Diagnosis] = (), title: str = "") -> str:
    """The whole page."""
    name = escape(title or f"Diagnosis of {diagnosis.model}")
    figures = "\n".join(_figure(panel) for panel in panels_of(diagnosis, history))
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
{verdict(diagnosis)}
{facts(diagnosis)}
<section aria-labelledby="figures">
<h2 id="figures">Layer by layer</h2>
<p class="hint">{MODEBAR}</p>
<noscript><p>The figures need JavaScript; the table has their numbers.</p></noscript>
{figures}
</section>
<section aria-labelledby="numbers">
<h2 id="numbers">The numbers</h2>
<div class="scroll" tabindex="0" role="region" aria-labelledby="numbers">
{listing(diagnosis)}
</div>
</section>
{glossary()}
</main>
<script>{get_plotlyjs()}</script>
<script>
{_part("page.js")}</script>
</body>
</html>
"""


def _figure(panel: Panel) -> str:
    head = f'<figure id="{panel.id}" aria-labelledby="{panel.id}-title">\n<h3 id="{panel.id}-title">{escape(panel.title)}</h3>'
    if panel.figure is None:
        return f'{head}\n<p class="missing">{escape(panel.missing)}</p>\n</figure>'
    # A closing tag inside a name must not end the script.
    spec = str(panel.figure.to_json()).replace("<", "\\u003c")
    return (
        f"{head}\n<figcaption>{escape(panel.caption)}</figcaption>\n"
        f'<div class="plot" role="img" tabindex="0" aria-label="{escape(panel.label)}" '
        f'style="height:{panel.figure.layout.height}px"></div>\n'
        f'<script type="application/json">{spec}</script>\n</figure>'
    )


def _part(name: str) -> str:
    return files("pws.diagnosis.report").joinpath(name).read_text(encoding="utf-8")
