"""What all pictures share: figures without a window, and the colours of the methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pws._files import written_whole

COLOURS: Final = {
    **{"none": "#c0392b", "wn": "#e67e22", "bn": "#2471a3", "pws": "#1e8449"},
    **{"nf": "#8e44ad", "gn": "#17a2b8", "ws": "#b7950b", "pws-paper": "#82c91e"},
}
"""The field's main methods keep their colour in all pictures."""


def colour_of(row: str, number: int) -> Any:
    """The colour of the row called `row`, the `number`-th of its picture."""
    return COLOURS.get(row) or matplotlib.colormaps["tab20"](number % 20)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=110)
