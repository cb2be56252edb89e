"""What is wrong with one object of an annotation file: checks, and an error that names the file and the object."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from pws._errors import PwsError, shown

LARGEST: Final = 1e9
"""No coordinate or area is larger, and neither NaN nor infinity is below it."""
ROUNDING: Final = 2.0
"""Pixels that a coordinate may lie beyond the image: it is clipped."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


class FaultError(ValueError):
    """The rest of a sentence that begins with the object."""


@contextmanager
def naming(file: Path, thing: str) -> Iterator[None]:
    """Turn a `FaultError` in the block into a `PwsError` about `thing` in `file`."""
    try:
        yield
    except FaultError as fault:
        raise PwsError(f"{file}: {thing} {fault}") from fault


def is_number(value: Any) -> bool:
    """Whether this is a finite number, and not a truth value."""
    return type(value) in (int, float) and abs(value) < LARGEST


def numbers(values: Any, count: int, what: str) -> list[float]:
    """`values` if they are a list of so many finite numbers."""
    if not isinstance(values, list) or len(values) != count or not all(map(is_number, values)):
        raise FaultError(f"needs {what} of {count} finite numbers; got {shown(values)}. Mend or remove it.")
    return [float(value) for value in values]


def box_inside(box: Box, height: int, width: int, form: str) -> Box:
    """The box, clipped to the image where it sticks out by rounding; `form` says which numbers the file should hold."""
    left, top, right, bottom = box
    corners = f"left {left:g}, top {top:g}, right {right:g}, bottom {bottom:g}"
    if right <= left or bottom <= top:
        raise FaultError(f"has a box without width or height: {corners}. {form} Mend or remove it.")
    beyond = max(-left, -top, right - width, bottom - height)
    if beyond > ROUNDING:
        raise FaultError(
            f"has a box beyond its image of {width} x {height} pixels: {corners}. {form} Mend or remove it."
        )
    clipped = max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))
    if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
        raise FaultError(f"has a box outside of its image of {width} x {height} pixels: {corners}. Mend or remove it.")
    return clipped
