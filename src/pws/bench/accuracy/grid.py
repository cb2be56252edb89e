"""Grids: what is trained, read from a YAML file.

A grid has rows (methods and their settings), columns (learning rate, batch size, network, steps) and seeds; all of them
change settings of one recipe. Settings are written as in a recipe (`optim: {lr: 0.1}`) or dotted (`optim.lr: 0.1`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import yaml

from pws.errors import PwsError, UnknownNameError
from pws.training.check import check_recipe
from pws.training.recipe import Recipe
from pws.training.recipe_file import flatten, recipe_of

KEYS: Final = ("title", "target", "evaluations", "evaluation_images", "seeds", "settings", "columns", "rows")
QUICK_STEPS: Final = 4
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
    content = _read(path)
    columns, rows = _columns(content["columns"]), content["rows"]
    if quick:
        columns = dict(list(columns.items())[:: max(1, len(columns) - 1)])
    base = flatten(content.get("settings", {}))
    cells = []
    for row, own in rows.items():
        own = flatten(own or {})
        seeds = own.pop("seeds", content.get("seeds", [0]))
        for seed in seeds[:1] if quick else seeds:
            for column, settings in columns.items():
                chosen = {**base, "model.method": row, **settings, **own, "seed": seed}
                cells.append(_cell(path, row, column, {**chosen, **_quick(chosen)} if quick else chosen))
    return Grid(
        name=path.stem,
        title=f"quick look, not a measurement: digits, {QUICK_STEPS} steps" if quick else content["title"],
        rows=tuple(rows),
        columns=tuple(columns),
        cells=tuple(sorted(cells, key=lambda cell: cell.recipe.seed)),
        target=float(content.get("target", 0.8)),
        evaluations=2 if quick else int(content.get("evaluations", 10)),
        evaluation_images=int(content.get("evaluation_images", 1000)),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PwsError(f"{path} is not a YAML file: {error}") from error
    if not isinstance(content, dict):
        raise PwsError(f"{path} must hold a grid's keys ({', '.join(KEYS)}); got {content!r}.")
    for key in content:
        if key not in KEYS:
            raise UnknownNameError(f"grid key in {path}:", key, KEYS)
    for key, kind, words in (("columns", list, "a list of settings"), ("rows", dict, "row names, each with settings")):
        if not isinstance(content.get(key), kind) or not content[key]:
            raise PwsError(f"{path}: {key} must be {words}, at least one; got {content.get(key)!r}.")
    return {"title": path.stem, **content}


def _columns(listed: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Label to settings; a label names whatever differs among the columns, in the words of the field."""
    columns = [flatten(settings or {}) for settings in listed]
    words: dict[str, Callable[[Any], str]] = {
        "model.name": str,
        "data.batch_size": "batch {}".format,
        "data.train_images": lambda count: "all images" if count is None else f"{int(count):,} images",
        "data.augment": lambda augment: "augmented" if augment else "not augmented",
        "optim.lr": lambda lr: f"LR {float(lr):g}",  # YAML reads 1e-3 as a word
    }
    varied = [key for key in words if len({str(column.get(key, "left out")) for column in columns}) > 1]
    try:
        labels = [", ".join(words[key](column[key]) for key in varied if key in column) for column in columns]
    except (TypeError, ValueError) as error:
        raise PwsError(f"columns: data.train_images and optim.lr must be numbers ({error}); got {columns}.") from error
    if len(set(labels)) < len(columns):
        raise PwsError(
            f"columns must differ in network, batch size, images, augmentation or learning rate; got {labels}."
        )
    return {label or ONLY_COLUMN: column for label, column in zip(labels, columns, strict=True)}


def _quick(settings: dict[str, Any]) -> dict[str, Any]:
    batch_size = min(int(settings.get("data.batch_size", 128)), 32)
    smaller = {"data.name": "digits", "data.image_size": 16, "data.train_images": 128, "data.batch_size": batch_size}
    return {**smaller, "model.width": 0.125, "trainer.max_steps": QUICK_STEPS, "trainer.epochs": 1}


def _cell(path: Path, row: str, column: str, settings: dict[str, Any]) -> Cell:
    try:
        recipe = recipe_of(settings)
        check_recipe(recipe)
    except PwsError as error:
        raise PwsError(f"{path}, row {row!r}, column {column!r}: {error}") from error
    return Cell(row, column, replace(recipe, name="cell"), settings)
