"""Draws a chart with plotly, for the page.

Colours are CSS variables of the page; `page.js` puts their present values in, again when the theme changes.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Sequence
from typing import Any

from plotly import graph_objects as go
from plotly.subplots import make_subplots

from pws.diagnosis.report.axis import Axis, Kind
from pws.diagnosis.report.chart import FEW, Chart, EndMarks, Look, Plot, Series

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
SYMBOLS: dict[Kind, str] = {"zero": "triangle-down-open", "infinite": "triangle-up", "undefined": "x-thin-open"}


def plotly_figure(chart: Chart) -> go.Figure:
    """The chart as plotly's figure."""
    rows = len(chart.plots)
    figure = make_subplots(rows=rows, cols=1, shared_xaxes=True, vertical_spacing=0.07)
    figure.update_layout(_layout(400 if rows == 1 else 560))
    figure.update_xaxes(**_axis(), showgrid=False, automargin=True, **_layer_ticks(chart))
    texts = [_hover(lines) for lines in chart.hovers]
    for row, plot in enumerate(chart.plots, 1):
        for trace in _traces(chart, plot, texts):
            figure.add_trace(trace, row=row, col=1)
        figure.update_yaxes(**_value_axis(plot), row=row, col=1)
        if plot.level is not None:
            height, name = plot.level
            figure.add_hline(y=height, line=_rule("dash"), showlegend=True, name=name)
    if not chart.names:
        figure.update_xaxes(title={"text": "training step", "standoff": 6}, row=rows, col=1)
    if chart.step is not None:
        figure.add_vline(x=chart.step, line=_rule("dot"))
    return figure


def _traces(chart: Chart, plot: Plot, texts: Sequence[str]) -> list[Any]:
    found: list[Any] = []
    in_legend: set[str] = set()
    for series in plot.series:
        values = series.drawn(plot.axis)
        if any(value is not None for value in values):
            found.append(_values(chart, series, values, texts))
        for marks in series.end_marks(plot.axis):
            found.append(_end_marks(chart, series.look, marks, texts, first=marks.name not in in_legend))
            in_legend.add(marks.name)
    return found


def _values(chart: Chart, series: Series, values: Sequence[float | None], texts: Sequence[str]) -> Any:
    look, few = series.look, len(values) <= FEW
    colour = f"var(--{look.colour})"
    common = {"name": series.name, "x": chart.xs, "y": values, "hovertext": texts, "hoverinfo": "text"}
    if look.bars:
        return go.Bar(**common, marker={"color": colour, "line": {"width": 0}})
    size = look.size if few else 0.6 * look.size
    return go.Scatter(
        **common,
        mode="lines+markers" if look.line else "markers",
        line={"color": colour, "width": 2 if few else 1.2, "dash": look.line or "solid"},
        marker={"color": colour, "symbol": look.symbol, "size": size, "line": {"width": 1.5, "color": colour}},
    )


def _end_marks(chart: Chart, look: Look, marks: EndMarks, texts: Sequence[str], *, first: bool) -> Any:
    colour = f"var(--{look.colour})"
    return go.Scatter(
        name=marks.name,
        x=[chart.xs[i] for i in marks.indices],
        y=marks.places,
        hovertext=[texts[i] for i in marks.indices],
        hoverinfo="text",
        mode="markers",
        showlegend=first,
        legendrank=2000,
        marker={"symbol": SYMBOLS[marks.kind], "size": 10, "color": colour, "line": {"width": 2, "color": colour}},
    )


def _layer_ticks(chart: Chart) -> dict[str, Any]:
    """The layers' names along the x axis, if it shows layers."""
    if not chart.names:
        return {}
    return {
        "tickvals": list(chart.xs),
        "ticktext": [_escape(name) for name in chart.names],
        "autotickangles": [0, -45, -90],
        "range": [-0.6, len(chart.xs) - 0.4],
    }


def _value_axis(plot: Plot) -> dict[str, Any]:
    return {
        **_axis(),
        **_value_ticks(plot.axis),
        "range": plot.axis.limits,
        "exponentformat": "power",
        "minexponent": 2,
        "title": {"text": plot.title, "standoff": 6, "font": {"size": 12}},
        "automargin": True,
        **({"tickformat": ".0%"} if plot.percent else {}),
    }


def _value_ticks(axis: Axis) -> dict[str, Any]:
    """Powers of ten, seven or fewer; plotly's choice where the axis is shorter than one. It draws powers a quarter larger."""
    if not axis.log:
        return {"type": "linear", "nticks": 7}
    decades = axis.limits[1] - axis.limits[0]
    tens = {"dtick": math.ceil(decades / 7)} if decades > 1.5 else {"dtick": "D2"}
    return {"type": "log", **tens, "tickfont": {"size": 10}}


def _hover(lines: Sequence[str]) -> str:
    name, *rows = lines
    heading = "<br>".join(_escape(part) for part in textwrap.wrap(name, 36))
    return "<br>".join([f"<b>{heading}</b>", *map(_escape, rows)])


def _escape(text: str) -> str:
    """Text for plotly, which reads some HTML."""
    return html.escape(text, quote=False)


def _rule(dash: str) -> dict[str, Any]:
    return {"color": "var(--ink)", "width": 1.5, "dash": dash}


def _axis() -> dict[str, Any]:
    return {
        "linecolor": "var(--axis)",
        "gridcolor": "var(--grid)",
        "tickcolor": "var(--axis)",
        "ticks": "outside",
        "ticklen": 4,
        "showline": True,
        "zeroline": False,
    }


def _layout(height: int) -> dict[str, Any]:
    text = {"family": FONT, "size": 12, "color": "var(--ink)"}
    return {
        "template": "none",
        "height": height,
        "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": text,
        "legend": {
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1.02,
            "yanchor": "bottom",
            "title": {"text": ""},
        },
        "hovermode": "closest",
        "hoverdistance": 40,
        "hoverlabel": {"align": "left", "bgcolor": "var(--card)", "font": text},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "var(--muted)", "activecolor": "var(--ink)"},
        "dragmode": "zoom",
        "uirevision": "kept",
        "bargap": 0.25,
    }
