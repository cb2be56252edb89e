"""Grids: what is trained, read from a YAML file.

A grid has rows (methods and their settings), columns (learning rate, batch size, network, steps) and seeds; all of them
change settings of one recipe. Settings are written as in a recipe (`optim: {lr: 0.1}`) or dotted (`optim.lr: 0.1`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Final

from pws._errors import PwsError, shown
from pws.training.parsing import parse_as
from pws.training.recipe import Recipe, TrainerConfig
from pws.training.recipe_file import recipe_of, settings_in
from pws.training.rules import AT_LEAST_ONE, POSITIVE, check_rules
from pws.training.yaml_file import read_yaml

MOST_CELLS: Final = 10_000
ONLY_COLUMN: Final = {"classify": "accuracy", "detect": "box AP"}
"""Label of a column with nothing to be told apart from."""
Settings = Mapping[str, Any]
"""What a recipe differs in from the defaults, dotted."""


@dataclass(frozen=True)
class Cell:
    """One training run of a grid."""

    row: str
    column: str
    recipe: Recipe
    settings: Settings
    """A stored cell counts as long as these are the same."""

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells the cell from others of its grid."""
        return self.row, self.column, self.recipe.seed


@dataclass(frozen=True)
class Grid:
    """Rows by columns by seeds."""

    path: Path
    """Its file."""
    title: str
    settings: Settings
    """What all cells share."""
    columns: Mapping[str, Settings]
    """By label."""
    rows: Mapping[str, Settings]
    """By label, which is the method unless the settings name one."""
    seeds: Mapping[str, tuple[int, ...]]
    """By row."""
    target: float
    """The test accuracy in [0, 1] that steps are counted to."""
    evaluations: int
    """How often the accuracy is taken during a run."""
    evaluation_images: int
    """How many of the first test images it is taken on."""

    @property
    def name(self) -> str:
        """The file's, without its ending."""
        return self.path.stem

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """Seed by seed, so that an early end leaves whole tables.

        Raises:
            PwsError: a setting has a wrong value.
        """
        chosen = [(row, c, seed) for row in self.rows for seed, c in product(self.seeds[row], self.columns)]
        return tuple(sorted((self._cell(*key) for key in chosen), key=lambda cell: cell.recipe.seed))

    def _cell(self, row: str, column: str, seed: int) -> Cell:
        settings = cell_settings(self.settings, self.columns[column], row, self.rows[row], seed)
        try:
            recipe = recipe_of(settings)
        except PwsError as error:
            raise PwsError(f"{self.path}, row {row!r}, column {column!r}: {error}") from error
        _check_trainer(recipe.trainer, f"{self.path}, row {row!r}, column {column!r}")
        return Cell(row, column, replace(recipe, name="cell"), settings)


def _check_trainer(trainer: TrainerConfig, where: str) -> None:
    length, plain = ("epochs", "max_steps"), TrainerConfig()
    for key, value in vars(trainer).items():
        if key not in length and value != getattr(plain, key):
            raise PwsError(
                f"{where}: a cell trains on one thread of the CPU, and takes trainer.epochs and trainer.max_steps alone; got "
                f"trainer.{key} {value!r}. Leave it out, or train the recipe with pws train."
            )


def cell_settings(shared: Settings, column: Settings, row: str, own: Settings, seed: int) -> dict[str, Any]:
    """The settings of one cell: what the row says wins over the column, and that over what all cells share."""
    return {**shared, "model.method": row, **column, **own, "seed": seed}


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


def load_grid(path: Path) -> Grid:
    """The grid in a YAML file.

    Raises:
        UnknownNameError: no such key or setting.
        PwsError: there is no such file, it is not a grid, or a setting has a wrong value.
    """
    if not path.is_file():
        raise PwsError(
            f"a grid is a YAML file of yours with columns and rows; {path} does not exist. Give its path (the project's own "
            "grids run from a checkout: python -m benchmarks accuracy NAME)."
        )
    content = read_yaml(path, "grid", KEYS)
    file: GridFile = parse_as(GridFile, content, str(path))
    check_rules(RULES, file, f"{path}: ")
    for key in ("columns", "rows", "seeds"):
        if not content.get(key, [0]):
            raise PwsError(f"{path}: {key} must hold at least one; got {shown(content[key])}.")
    shared = _settings(path, "settings", content.get("settings") or {})
    columns = _columns(path, content["columns"], shared.get("task"))
    rows, seeds = _rows(path, file, content["rows"], len(columns))
    counts = file.target, file.evaluations, file.evaluation_images
    grid = Grid(path, file.title or path.stem, shared, columns, rows, seeds, *counts)
    _ = grid.cells  # which checks their settings
    return grid


def _rows(
    path: Path, file: GridFile, written: Mapping[str, Any], columns: int
) -> tuple[dict[str, Settings], dict[str, tuple[int, ...]]]:
    """Settings and seeds by row. Settings are taken as they are written: what they mean is the recipe's to say."""
    rows: dict[str, Settings] = {}
    seeds: dict[str, tuple[int, ...]] = {}
    for row, own in written.items():
        own = dict(own or {})
        seeds[row] = tuple(parse_as(list[int], own.pop("seeds", file.seeds), f"{path}, row {row!r}, seeds"))
        rows[row] = _settings(path, f"row {row!r}", own)
        if not seeds[row] or sum(map(len, seeds.values())) * columns > MOST_CELLS:
            raise PwsError(f"{path}: seeds must be a list of at least one, and cells at most {MOST_CELLS:,}.")
    return rows, seeds


def _settings(path: Path, where: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted settings, each of which a recipe takes."""
    return settings_in(content, f"{path}, {where}")


def _columns(path: Path, listed: list[dict[str, Any]], task: Any) -> dict[str, Settings]:
    """Label to settings; a label names whatever differs among the columns, in the words of the field."""
    only = ONLY_COLUMN.get(str(task), ONLY_COLUMN["classify"])
    columns = [_settings(path, f"column {number}", settings) for number, settings in enumerate(listed, 1)]
    words: dict[str, Callable[[Any], str]] = {
        "model.name": str,
        "data.batch_size": "batch {}".format,
        "data.train_images": lambda count: "all images" if count is None else f"{int(count):,} images",
        "model.head": "{} head".format,
        "data.augment": lambda augment: "augmented" if augment else "not augmented",
        "federated.clients": "{} clients".format,
        "federated.alpha": lambda alpha: "equal parts" if alpha is None else f"alpha {float(alpha):g}",
        "federated.skew": "skew {}".format,
        "privacy.epsilon": lambda epsilon: f"epsilon {float(epsilon):g}",
        "privacy.clip_norm": lambda norm: f"clip norm {float(norm):g}",
        "optim.lr": lambda lr: f"LR {float(lr):g}",  # YAML reads 1e-3 as a word
    }
    varied = [key for key in words if len({str(column.get(key, "left out")) for column in columns}) > 1]
    labels = [", ".join(words[key](column[key]) for key in varied if key in column) for column in columns]
    if len(set(labels)) < len(columns):
        raise PwsError(
            f"{path}: columns must differ in network, batch size, images, augmentation, clients, epsilon, clip norm or "
            f"learning rate; got {shown(labels)}."
        )
    return {label or only: column for label, column in zip(labels, columns, strict=True)}
