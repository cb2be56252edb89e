"""Grids: what is trained, read from a YAML file.

A grid has rows (methods and their settings), columns (learning rate, batch size, network, steps) and seeds; all of them
change settings of one recipe. Settings are written as in a recipe (`optim: {lr: 0.1}`) or dotted (`optim.lr: 0.1`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, Final

from pws._errors import PwsError, UnknownNameError, shown
from pws.training.parsing import parse_as
from pws.training.recipe import Recipe
from pws.training.recipe_file import recipe_of, settings_in
from pws.training.rules import AT_LEAST_ONE, POSITIVE, check_rules
from pws.training.yaml_file import read_yaml

QUICK_STEPS: Final = 4
MOST_CELLS: Final = 10_000
ONLY_COLUMN: Final = "accuracy"
"""Label of a column with nothing to be told apart from."""


@dataclass(frozen=True)
class Cell:
    """One training run."""

    row: str
    column: str
    recipe: Recipe
    settings: Mapping[str, Any]
    """What the recipe differs in from the defaults, dotted: a stored cell counts as long as these are the same."""

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells the cell from others of its grid."""
        return self.row, self.column, self.recipe.seed


@dataclass(frozen=True)
class Grid:
    """Rows by columns by seeds."""

    name: str
    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[Cell, ...]
    """Seed by seed, so that an early end leaves whole tables."""
    target: float
    """The test accuracy in [0, 1] that steps are counted to."""
    evaluations: int
    """How often the accuracy is taken during a run."""
    evaluation_images: int
    """On how many of the first test images."""


def shipped_grids() -> dict[str, Path]:
    """Name to file of the grids that come with pws."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "grids").glob("*.yaml"))}


@dataclass
class GridFile:
    """A grid as it is written: what its keys may hold."""

    columns: list[dict[str, Any]]
    rows: dict[str, dict[str, Any] | None]
    title: str = ""
    target: float = 0.8
    evaluations: int = 10
    evaluation_images: int = 1000
    seeds: list[int] = field(default_factory=lambda: [0])
    settings: dict[str, Any] | None = None


KEYS: Final = tuple(field.name for field in fields(GridFile))
RULES: Final = {"target": POSITIVE, "evaluations": AT_LEAST_ONE, "evaluation_images": AT_LEAST_ONE}


def load_grid(name: str, *, quick: bool = False) -> Grid:
    """The shipped grid called `name`, or the YAML file of that path.

    Args:
        name: of a grid or a file.
        quick: digits, narrow networks, a few steps, one seed, the first and the last column: to see that it works.

    Raises:
        UnknownNameError: no such grid, key or setting.
        PwsError: the file is not a grid, or a setting has a wrong value.
    """
    path = shipped_grids().get(name, Path(name))
    if not path.is_file():
        raise UnknownNameError("grid (no such file or shipped grid)", name, shipped_grids())
    content = read_yaml(path, "grid", KEYS)
    file: GridFile = parse_as(GridFile, content, str(path))
    check_rules(RULES, file, f"{path}: ")
    for key in ("columns", "rows", "seeds"):
        if not content.get(key, [0]):
            raise PwsError(f"{path}: {key} must hold at least one; got {shown(content[key])}.")
    columns = _columns(path, content["columns"])
    if quick:
        columns = dict(list(columns.items())[:: max(1, len(columns) - 1)])
    return Grid(
        name=path.stem,
        title=f"quick look, not a measurement: digits, {QUICK_STEPS} steps" if quick else file.title or path.stem,
        rows=tuple(content["rows"]),
        columns=tuple(columns),
        cells=tuple(_cells(path, file, content, columns, quick=quick)),
        target=file.target,
        evaluations=2 if quick else file.evaluations,
        evaluation_images=file.evaluation_images,
    )


def _cells(
    path: Path, file: GridFile, content: Mapping[str, Any], columns: Mapping[str, Mapping[str, Any]], *, quick: bool
) -> list[Cell]:
    """Seed by seed. Settings are taken as they are written: what they mean is the recipe's to say."""
    base = _settings(path, "settings", content.get("settings") or {})
    chosen: list[tuple[str, str, dict[str, Any]]] = []
    for row, own in content["rows"].items():
        own = dict(own or {})
        seeds = parse_as(list[int], own.pop("seeds", file.seeds), f"{path}, row {row!r}, seeds")
        own = _settings(path, f"row {row!r}", own)
        if not seeds or len(seeds) * len(columns) + len(chosen) > MOST_CELLS:
            raise PwsError(f"{path}: seeds must be a list of at least one, and cells at most {MOST_CELLS:,}.")
        for seed, (column, settings) in product(seeds[:1] if quick else seeds, columns.items()):
            chosen.append((row, column, {**base, "model.method": row, **settings, **own, "seed": seed}))
    cells = [_cell(path, row, column, {**s, **_quick(s)} if quick else s) for row, column, s in chosen]
    return sorted(cells, key=lambda cell: cell.recipe.seed)


def _settings(path: Path, where: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted settings, each of which a recipe takes."""
    return settings_in(content, f"{path}, {where}")


def _columns(path: Path, listed: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Label to settings; a label names whatever differs among the columns, in the words of the field."""
    columns = [_settings(path, f"column {number}", settings) for number, settings in enumerate(listed, 1)]
    words: dict[str, Callable[[Any], str]] = {
        "model.name": str,
        "data.batch_size": "batch {}".format,
        "data.train_images": lambda count: "all images" if count is None else f"{int(count):,} images",
        "data.augment": lambda augment: "augmented" if augment else "not augmented",
        "optim.lr": lambda lr: f"LR {float(lr):g}",  # YAML reads 1e-3 as a word
    }
    varied = [key for key in words if len({str(column.get(key, "left out")) for column in columns}) > 1]
    labels = [", ".join(words[key](column[key]) for key in varied if key in column) for column in columns]
    if len(set(labels)) < len(columns):
        raise PwsError(
            f"{path}: columns must differ in network, batch size, images, augmentation or learning rate; got {shown(labels)}."
        )
    return {label or ONLY_COLUMN: column for label, column in zip(labels, columns, strict=True)}


def _quick(settings: dict[str, Any]) -> dict[str, Any]:
    batch_size = min(int(settings.get("data.batch_size", 128)), 32)
    smaller = {"data.name": "digits", "data.image_size": 16, "data.train_images": 128, "data.batch_size": batch_size}
    return {**smaller, "model.width": 0.125, "trainer.max_steps": QUICK_STEPS, "trainer.epochs": 1}


def _cell(path: Path, row: str, column: str, settings: dict[str, Any]) -> Cell:
    try:
        recipe = recipe_of(settings)
    except PwsError as error:
        raise PwsError(f"{path}, row {row!r}, column {column!r}: {error}") from error
    return Cell(row, column, replace(recipe, name="cell"), settings)
