"""A chart as plain data: what it shows, whichever library draws it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pws.diagnosis.report.axis import NAMES, Axis, Kind, split

FEW = 48
"""Points of a series up to which they are drawn large."""


@dataclass(frozen=True)
class Look:
    """How a series is drawn: never told apart by colour alone."""

    colour: Literal["input", "output", "centred", "shift", "ink"]
    """A colour of `page.css`."""
    symbol: Literal["circle", "circle-open", "square", "diamond", "diamond-open", "line-ew-open"] = "circle"
    line: Literal["", "solid", "dot", "dash", "dashdot"] = ""
    """Its dashes; empty for markers without a line."""
    size: float = 7
    bars: bool = False


@dataclass(frozen=True)
class EndMarks:
    """The values of a series that have no place of their own: they stand at an end of the axis."""

    kind: Kind
    name: str
    indices: list[int]
    places: list[float]


@dataclass(frozen=True)
class Series:
    """One value for each x, None where there is none."""

    name: str
    values: Sequence[float | None]
    look: Look
    words: Mapping[Kind, str] = field(default_factory=dict)
    """What the legend says of values that stand at an end of the axis; by default what they are."""

    def drawn(self, axis: Axis) -> list[float | None]:
        """The values that have a place on the axis.

        The line has gaps at the others: a line down to the mark of a zero would look like a slope.
        """
        return [v if v is not None and axis.kind(v) == "value" else None for v in self.values]

    def end_marks(self, axis: Axis) -> list[EndMarks]:
        """The other values, kind by kind."""
        kinds = split(self.values, axis)
        found = []
        for kind in (kind for kind in NAMES if kind in kinds):
            word = self.words.get(kind, NAMES[kind] if "value" in kinds else f"{self.name}: {NAMES[kind]}")
            places = [axis.place(self.values[i] or 0.0) for i in kinds[kind]]
            found.append(EndMarks(kind, word, kinds[kind], places))
        return found


@dataclass(frozen=True)
class Plot:
    """Series over a common y axis."""

    title: str
    """The y axis's."""
    axis: Axis
    series: tuple[Series, ...]
    percent: bool = False
    level: tuple[float, str] | None = None
    """The height and the name of a line across the plot."""


@dataclass(frozen=True)
class Chart:
    """Plots over a common x axis, one above the other."""

    id: str
    title: str
    caption: str
    """How to read it."""
    label: str
    """What a screen reader says."""
    xs: Sequence[float]
    hovers: Sequence[Sequence[str]]
    """For each x a heading and the lines below it."""
    plots: tuple[Plot, ...]
    names: Sequence[str] = ()
    """The layers, where these are the x axis; otherwise it shows training steps."""
    step: float | None = None
    """A training step to mark."""
    missing: str = ""
    """Why nothing is drawn."""
