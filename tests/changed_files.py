"""Changes to a file that the tests draw: something else at one place of a structure, other bytes, no file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import yaml
from hypothesis import strategies as st

VALUES: Final[tuple[Any, ...]] = (None, True, -1, 0, 0.5, "", "x", "nan", [], {}, [[]], [None], {"x": {"y": 1}}, 10**30)
Draw = Callable[..., Any]
"""`draw` of hypothesis."""
BYTES: Final = b"\x00\xff:[]{}&*!-#x'\"\n "


def places(content: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a structure."""
    parts = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [at, *(place for key, part in parts for place in places(part, (*at, key)))]


def structure(draw: Draw, path: Path) -> None:
    """Something else at one place of a YAML or JSON file."""
    content = [yaml.safe_load(path.read_text())]
    *way, last = draw(st.sampled_from(places(content)[1:]))
    part: Any = content
    for key in way:
        part = part[key]
    part[last] = draw(st.sampled_from(VALUES))
    text = json.dumps(content[0]) if path.suffix == ".json" else yaml.safe_dump(content[0])
    path.write_text(text)


def damage(draw: Draw, path: Path) -> None:
    """Bytes of a file are others, missing or more."""
    content = bytearray(path.read_bytes())
    at = draw(st.integers(0, max(0, len(content) - 1)))
    match draw(st.sampled_from(("change", "cut", "insert", "empty", "gone", "folder"))):
        case "change":
            content[at : at + 1] = bytes([draw(st.sampled_from(BYTES))])
        case "cut":
            del content[at:]
        case "insert":
            content[at:at] = bytes(draw(st.lists(st.sampled_from(BYTES), min_size=1, max_size=5)))
        case "empty":
            content.clear()
        case kind:
            path.unlink()
            if kind == "folder":
                path.mkdir()
            return
    path.write_bytes(content)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
