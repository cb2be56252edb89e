"""How every figure of the page looks: its axes, and a series with the marks of what is no number.

Colours are CSS variables of the page; `page.js` puts their present values in, again when the theme changes.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from plotly import graph_objects as go

from pws.diagnosis.layer import LayerDiagnosis
from pws.diagnosis.report.marks import NAMES, Axis, Kind, split
from pws.diagnosis.report.words import note_of, shape, short

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
FEW = 48
"""Points of a series up to which they are drawn large."""
SYMBOLS: dict[Kind, str] = {"zero": "triangle-down-open", "infinite": "triangle-up", "undefined": "x-thin-open"}


@dataclass(frozen=True)
class Look:
    """A series: never told apart by colour alone."""

    colour: str
    symbol: str = "circle"
    line: str = ""
    """Its dashes; empty for markers without a line."""
    size: float = 7
    bars: bool = False


@dataclass
class Drawing:
    """A figure in the making."""

    figure: go.Figure
    xs: Sequence[float]
    texts: Sequence[str]
    """What hovering over each x says."""
    seen: set[tuple[str, int]] = field(default_factory=set)
    """The marks that are in the legend already."""

    def series(
        self, name: str, values: Sequence[float | None], axis: Axis, look: Look, row: int = 1, **names: str
    ) -> None:
        """Draw values; what is no positive number stands at the end of the axis. `names` are words for such marks."""
        kinds = split(values, axis)
        # The gaps in the line are where the marks stand: a line down to the mark of a zero would look like a slope.
        drawn = [value if i in kinds.get("value", ()) else None for i, value in enumerate(values)]
        if any(value is not None for value in drawn):
            self._values(name, drawn, look, row)
        for kind in ("zero", "infinite", "undefined"):
            if kind in kinds:
                word = NAMES[kind] if "value" in kinds else f"{name}: {NAMES[kind]}"
                self._marks(kind, kinds[kind], values, axis, look, row, names.get(kind, word))

    def _values(self, name: str, values: Sequence[float | None], look: Look, row: int) -> None:
        few = len(values) <= FEW
        common = {"name": name, "x": self.xs, "y": values, "hovertext": self.texts, "hoverinfo": "text"}
        if look.bars:
            trace = go.Bar(**common, marker={"color": look.colour, "line": {"width": 0}})
        else:
            trace = go.Scatter(
                **common,
                mode="lines+markers" if look.line else "markers",
                line={"color": look.colour, "width": 2 if few else 1.2, "dash": look.line or "solid"},
                marker={
                    "color": look.colour,
                    "symbol": look.symbol,
                    "size": look.size if few else 0.6 * look.size,
                    "line": {"width": 1.5},
                },
            )
            trace.marker.line.color = look.colour
        self._add(trace, row)

    def _marks(
        self, kind: Kind, at: list[int], values: Sequence[float | None], axis: Axis, look: Look, row: int, name: str
    ) -> None:
        first = (name, row) not in self.seen
        self.seen.add((name, row))
        trace = go.Scatter(
            name=name,
            x=[self.xs[i] for i in at],
            y=[axis.place(values[i] or 0.0) for i in at],
            hovertext=[self.texts[i] for i in at],
            hoverinfo="text",
            mode="markers",
            showlegend=first,
            legendrank=2000,
            marker={"symbol": SYMBOLS[kind], "size": 10, "color": look.colour, "line": {"width": 2}},
        )
        trace.marker.line.color = look.colour
        self._add(trace, row)

    def _add(self, trace: Any, row: int) -> None:
        self.figure.add_trace(trace, row=row, col=1) if row > 1 else self.figure.add_trace(trace)


def depth_drawing(layers: Sequence[LayerDiagnosis], texts: Sequence[str]) -> Drawing:
    """A figure with the layers along its x axis."""
    figure = go.Figure(layout=_layout(400))
    ticks = {"tickvals": list(range(len(layers))), "ticktext": [escape(short(layer.name)) for layer in layers]}
    figure.update_xaxes(
        **_axis(),
        **ticks,
        showgrid=False,
        autotickangles=[0, -45, -90],
        automargin=True,
        range=[-0.6, len(layers) - 0.4],
    )
    return Drawing(figure, list(range(len(layers))), texts)


def step_drawing(figure: go.Figure, steps: Sequence[float], texts: Sequence[str]) -> Drawing:
    """A figure with training steps along its x axis."""
    figure.update_layout(_layout(560))
    figure.update_xaxes(**_axis(), showgrid=False, automargin=True)
    return Drawing(figure, steps, texts)


def value_axis(figure: go.Figure, title: str, *, axis: Axis, **more: Any) -> None:
    """Style a y axis, by default all of the figure's."""
    place = {key: more.pop(key) for key in ("row", "col") if key in more}
    figure.update_yaxes(
        **_axis(),
        **_ticks(axis),
        range=axis.limits,
        exponentformat="power",
        minexponent=2,
        title={"text": title, "standoff": 6, "font": {"size": 12}},
        automargin=True,
        **more,
        **place,
    )


def _ticks(axis: Axis) -> dict[str, Any]:
    """Powers of ten, seven or fewer; plotly's choice where the axis is shorter than one. It draws powers a quarter larger."""
    if not axis.log:
        return {"type": "linear", "nticks": 7}
    decades = axis.limits[1] - axis.limits[0]
    tens = {"dtick": math.ceil(decades / 7)} if decades > 1.5 else {"dtick": "D2"}
    return {"type": "log", **tens, "tickfont": {"size": 10}}


def level(figure: go.Figure, value: float, name: str) -> None:
    """A line across the figure, with a legend."""
    figure.add_hline(y=value, line={"color": "var(--ink)", "width": 1.5, "dash": "dash"}, showlegend=True, name=name)


def hover(layer: LayerDiagnosis, **lines: str) -> str:
    """What a point says: the layer, then a line for each word, with `_` for a space."""
    name = "<br>".join(escape(part) for part in textwrap.wrap(layer.name, 36)) or "(unnamed)"
    rows = [f"{escape(word.replace('_', ' '))}: {escape(value)}" for word, value in lines.items() if value]
    note = [escape(note_of(layer))] if note_of(layer) else []
    return "<br>".join([f"<b>{name}</b>", f"{escape(layer.kind)}, kernel {shape(layer)}", *rows, *note])


def escape(text: str) -> str:
    """Text for plotly, which reads some HTML."""
    return html.escape(text, quote=False)


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
    return {
        "template": "none",
        "height": height,
        "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 12, "color": "var(--ink)"},
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
        "hoverlabel": {
            "align": "left",
            "bgcolor": "var(--card)",
            "font": {"family": FONT, "size": 12, "color": "var(--ink)"},
        },
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "var(--muted)", "activecolor": "var(--ink)"},
        "dragmode": "zoom",
        "uirevision": "kept",
        "bargap": 0.25,
    }
