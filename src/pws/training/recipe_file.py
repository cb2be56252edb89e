"""Recipe files and their overrides, read by jsonargparse from the dataclasses of `recipe.py`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, get_type_hints

from jsonargparse import ArgumentParser

from pws._errors import PwsError, UnknownNameError, nearest, shown
from pws.training.check import check_recipe
from pws.training.recipe import Recipe
from pws.training.typed import PARSER_ERRORS, parser_says, read_yaml

RESULT: Final = ("seed", "model", "data", "optim", "trainer.epochs", "trainer.max_steps")
"""The settings that a run's result depends on; devices, precision and the like may change between sessions."""


def recipe_parser(prog: str, description: str, epilog: str) -> ArgumentParser:
    """A parser of every setting of a recipe; the command adds its own arguments."""
    parser = ArgumentParser(prog=prog, description=description, epilog=epilog, exit_on_error=False)
    parser.add_class_arguments(Recipe)
    return parser


def parse_recipe(parser: ArgumentParser, path: Path, flags: Sequence[str]) -> tuple[Recipe, Any]:
    """The recipe in `path` with `flags` over it, and all that was parsed.

    Raises:
        PwsError: the file is not YAML, a key or flag is unknown, or a value has the wrong type.
    """
    settings = settings_in(read_yaml(path, "recipe"), str(path))
    try:
        recipe_of(settings)
    except PwsError as error:
        raise PwsError(f"{path}: {error}") from error
    recipe, parsed = _build(parser, [*_flags(settings), *flags])
    recipe.name = recipe.name or path.stem
    if not re.fullmatch(r"[\w+-][\w.+-]*", recipe.name):
        raise PwsError(
            f"name is a folder's name: letters, digits, '.', '_', '+', '-', not a '.' first; got {recipe.name!r}."
        )
    check_recipe(recipe)
    return recipe, parsed


def _build(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[Recipe, Any]:
    try:
        parsed = parser.parse_args(arguments)
    except PARSER_ERRORS as error:
        raise PwsError(_explain(parser_says(error), parser)) from error
    built = parser.instantiate(parsed)
    return Recipe(**{field.name: built[field.name] for field in fields(Recipe)}), parsed


def recipe_of(settings: Mapping[str, Any]) -> Recipe:
    """The recipe of dotted settings (`{"optim.lr": 0.1}`), the defaults for the rest.

    Raises:
        PwsError: a key that no recipe has, or a value of the wrong type.
    """
    settings = settings_in(settings, "a recipe's settings")
    return _build(_plain_parser(), _flags(settings))[0]


def _flags(settings: Mapping[str, Any]) -> list[str]:
    return [f"--{key}={'null' if value is None else value}" for key, value in settings.items()]


def load_recipe(path: str | Path, *flags: str) -> Recipe:
    """A recipe file (or a shipped recipe's name) with `--part.key=value` flags over it."""
    return parse_recipe(_plain_parser(), find_recipe(str(path)), flags)[0]


@cache
def _plain_parser() -> ArgumentParser:
    return recipe_parser("pws", "", "")


def find_recipe(name: str) -> Path:
    """The file of that path, the recipe of that run folder, or the shipped recipe of that name.

    Raises:
        UnknownNameError: none of these.
    """
    path = Path(name)
    if (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    if path.is_file():
        return path
    shipped = {file.stem: file for file in shipped_recipes()}
    if path.stem in shipped and path.suffix in ("", ".yaml"):
        return shipped[path.stem]
    raise UnknownNameError("recipe (no such file, run folder or shipped recipe)", name, shipped)


def shipped_recipes() -> list[Path]:
    """The recipes that come with pws: inside the installed package, or beside src in a checkout."""
    package = Path(__file__).parents[1]
    for folder in (package / "recipes", package.parents[1] / "recipes"):
        if folder.is_dir():
            return sorted(folder.glob("*.yaml"))
    raise PwsError(
        f"the shipped recipes are missing from {package}: the installation is broken, install pws-torch again."
    )


def settings_in(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Dotted settings of a recipe's content, each a word, a number or a list of them.

    Raises:
        UnknownNameError: a key that no recipe has; `where` it stands is in the error.
        PwsError: a setting holds a mapping, or a list of lists.
    """
    known, settings = set(_keys(Recipe)), flatten(content)
    for key, value in settings.items():
        if key not in known:
            raise UnknownNameError(f"recipe key in {where}:", key, known)
        if any(isinstance(part, dict | list) for part in (value if isinstance(value, list) else [value])):
            raise PwsError(f"{where}: {key} must be a word, a number or a list of them; got {shown(value)}.")
    return settings


def _keys(cls: type, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(cls)
    for field in fields(cls):
        if is_dataclass(hints[field.name]):
            yield from _keys(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def flatten(content: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted settings of a recipe's content: `{"optim": {"lr": 0.1}}` to `{"optim.lr": 0.1}`."""
    parts = {field.name for field in fields(Recipe) if is_dataclass(get_type_hints(Recipe)[field.name])}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        nested = key in parts and (value is None or isinstance(value, dict))
        flat.update({f"{key}.{name}": part for name, part in (value or {}).items()} if nested else {key: value})
    return flat


def differing(stored: Mapping[str, Any], recipe: Recipe, parts: tuple[str, ...]) -> dict[str, tuple[Any, Any]]:
    """The settings in these parts that differ from a stored recipe's, which may lack defaults: there and here."""
    there, here = {**flatten(asdict(Recipe())), **flatten(stored)}, flatten(asdict(recipe))
    changed = {key: (there.get(key), here.get(key)) for key in {**here, **there} if there.get(key) != here.get(key)}
    return {key: pair for key, pair in changed.items() if key.startswith(parts)}


def _explain(message: str, parser: ArgumentParser) -> str:
    unknown = re.search(r"unrecognized arguments: (\S+)", message)
    if unknown:
        flags = {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
        return f"unknown flag {unknown[1]}{nearest(unknown[1].split('=')[0], flags)}"
    return message
