"""Recipe files and their overrides, read by jsonargparse from the dataclasses of `recipe.py`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final, get_args, get_type_hints

from jsonargparse import ArgumentParser, Namespace

from pws._errors import PwsError, UnknownNameError, nearest
from pws.training.parsing import PARSER_ERRORS, parser_message
from pws.training.recipe import Recipe
from pws.training.yaml_file import read_yaml

RESULT: Final = (
    "task",
    "seed",
    "model",
    "data",
    "optim",
    "privacy",
    "federated",
    "trainer.epochs",
    "trainer.max_steps",
)
"""The settings that a run's result depends on; devices, precision and the like may change between sessions."""


def _types(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(cls)
    for field in fields(cls):
        if is_dataclass(hints[field.name]):
            yield from _types(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", hints[field.name]


SETTINGS: Final[dict[str, Any]] = dict(_types(Recipe))
"""Dotted name to type of all that a recipe sets."""
PARTS: Final = {key.partition(".")[0] for key in SETTINGS if "." in key}


def recipe_parser(prog: str = "pws", description: str = "", epilog: str = "") -> ArgumentParser:
    """A parser of every setting of a recipe; the command adds its own arguments."""
    parser = ArgumentParser(prog=prog, description=description, epilog=epilog, exit_on_error=False)
    parser.add_class_arguments(Recipe)
    return parser


def load_recipe(path: str | Path, *flags: str) -> Recipe:
    """A recipe file (or a shipped recipe's name) with `--part.key=value` flags over it."""
    return parse_recipe(_plain_parser(), find_recipe(str(path)), flags)[0]


def parse_recipe(parser: ArgumentParser, path: Path, flags: Sequence[str]) -> tuple[Recipe, Any]:
    """The recipe in `path` with `flags` over it, and all that was parsed.

    Raises:
        PwsError: the file is not YAML, a key or flag is unknown, a value has the wrong type, or a rule is broken.
    """
    given = _parsed(parser, read_yaml(path, "recipe"), str(path))
    try:
        parsed = parser.parse_args(list(flags), namespace=given)
    except PARSER_ERRORS as error:
        raise PwsError(_explain(parser_message(error), parser)) from error
    try:
        recipe = _built(parser, parsed)
        return (recipe if recipe.name else replace(recipe, name=path.stem)), parsed
    except PwsError as error:
        raise PwsError(f"{path}{' with the flags over it' if flags else ''}: {error}") from error


def recipe_of(settings: Mapping[str, Any]) -> Recipe:
    """The recipe of settings, dotted (`{"optim.lr": 0.1}`) or nested, the defaults for the rest.

    Raises:
        PwsError: a key that no recipe has, a value of the wrong type, or a rule is broken.
    """
    parser = _plain_parser()
    given = _parsed(parser, settings, "a recipe's settings")
    return _built(parser, parser.parse_args([], namespace=given))


def settings_in(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Dotted settings of a part of a recipe, as they are written; each has a recipe's key and its type.

    Raises:
        UnknownNameError: a key that no recipe has; `where` it stands begins the error.
        PwsError: a value of the wrong type.
    """
    _parsed(_plain_parser(), content, where)
    return flatten(content)


def _parsed(parser: ArgumentParser, content: Mapping[str, Any], where: str) -> Namespace:
    """The settings that `content` holds, and no other."""
    given: dict[str, Any] = {}
    for key, value in flatten(content).items():
        if key not in SETTINGS:
            raise UnknownNameError(f"recipe key in {where}:", key, SETTINGS)
        if value is None and type(None) not in get_args(SETTINGS[key]):  # the parser takes None for any type
            raise PwsError(f"{where}: {key} must have a value; got none. Write it behind the key, or remove the line.")
        given[key] = deepcopy(value)  # the parser writes into what it is given
    try:
        parsed: Namespace = parser.parse_object(given, defaults=False)
    except PARSER_ERRORS as error:
        raise PwsError(f"{where}: {parser_message(error)}") from error
    return parsed


def _built(parser: ArgumentParser, parsed: Namespace) -> Recipe:
    built = parser.instantiate(parsed)
    return Recipe(**{field.name: built[field.name] for field in fields(Recipe)})


@cache
def _plain_parser() -> ArgumentParser:
    return recipe_parser()


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


def flatten(content: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted settings of a recipe's content: `{"optim": {"lr": 0.1}}` to `{"optim.lr": 0.1}`."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        nested = key in PARTS and (value is None or isinstance(value, dict))
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
