"""The grids behind the documentation: YAML files in the folder grids."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pws._errors import UnknownNameError
from pws.bench.grid import Grid, load_grid

GRIDS: Final = {path.stem: path for path in sorted((Path(__file__).parent / "grids").glob("*.yaml"))}


def shipped_grid(name: str) -> Grid:
    """The grid called `name`; raises `UnknownNameError` if there is none."""
    if name not in GRIDS:
        raise UnknownNameError("grid", name, GRIDS)
    return load_grid(GRIDS[name])
