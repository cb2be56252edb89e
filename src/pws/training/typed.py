"""What stands in files of others, held to types: one reader and one error for recipes, grids, suites and results."""

from __future__ import annotations

import re
from argparse import ArgumentError
from collections.abc import Collection
from copy import deepcopy
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml
from jsonargparse import ArgumentParser

from pws._errors import PwsError, UnknownNameError, one_line, shown

LARGEST: Final = 1_000_000
"""Characters of a YAML file, and values in it once its aliases are written out: ten aliases of ten make a gigabyte."""

PARSER_ERRORS: Final = (ArgumentError, TypeError, ValueError, ArithmeticError)
"""What jsonargparse raises for a value: its own error, or that of a conversion, as of 10 ** 400 to a float."""


def read_yaml(path: Path, what: str, known: Collection[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML file: words to plain values, lists and mappings.

    Args:
        path: the file.
        what: it is, for the errors: a grid, a suite, a recipe.
        known: the keys that it may have; every key if empty.

    Raises:
        PwsError: it is no YAML file, or holds something else.
        UnknownNameError: a key is not among `known`.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LARGEST)
        content = yaml.safe_load(text)
    except OSError:
        raise
    except Exception as error:  # a file may hold anything, and yaml's constructors raise errors of their own
        raise PwsError(f"{path} is not a YAML file: {one_line(error)}.") from error
    if not isinstance(content, dict):
        keys = f" ({', '.join(known)})" if known else ""
        raise PwsError(f"{path} must hold a {what}'s keys{keys}; got {shown(content)}.")
    if len(text) == LARGEST:
        raise PwsError(f"{path} is larger than {LARGEST:,} characters: it is no {what}.")
    _check_plain(content, f"{path}:")
    for key in content:
        if known and key not in known:
            raise UnknownNameError(f"{what} key in {path}:", key, known)
    return content


def _check_plain(content: dict[str, Any], where: str) -> None:
    """Words to plain values all the way down, and not too many: an alias can hold itself."""
    waiting, seen = [content], 0
    while waiting:
        value: Any = waiting.pop()
        seen += 1
        if seen > LARGEST:
            raise PwsError(f"{where} its aliases (*name) stand for more than {LARGEST:,} values. Write them out.")
        if isinstance(value, dict):
            odd = [key for key in value if not isinstance(key, str)]
            if odd:
                raise PwsError(
                    f"{where} keys are words; got {shown(odd[0])}. YAML reads no and 1 otherwise: quote them."
                )
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
        elif not (value is None or isinstance(value, bool | int | float | str)):
            raise PwsError(f"{where} values are words, numbers, lists and mappings; got {shown(value)}.")


def typed(kind: Any, value: Any, where: str) -> Any:
    """`value` as the type `kind` (a dataclass, `list[int]`, ...); `where` it stands begins the error.

    Numbers may be written as words, as YAML reads 1e-3.

    Raises:
        PwsError: the value, or a part of it, is of another type.
    """
    parser = _parser(kind)
    if is_dataclass(kind) and isinstance(value, dict):  # a key with nothing behind it is left out
        required = {field.name for field in fields(kind) if field.default is field.default_factory is MISSING}
        value = {key: item for key, item in value.items() if item is not None or key in required}
    try:
        parsed = parser.parse_object({"value": deepcopy(value)})  # it writes into what it is given
    except PARSER_ERRORS as error:
        message = parser_says(error).removeprefix("value: ").replace("value.", "")
        raise PwsError(f"{where}: {message}.") from error
    return parser.instantiate(parsed)["value"]


def check_each(kind: type, entries: Any, where: str) -> None:
    """Raise `PwsError` unless `entries`, a list or a mapping, are mappings with all that the dataclass `kind` has, and more."""
    if not isinstance(entries, list | dict):
        raise PwsError(f"{where} must be a list; got {shown(entries)}.")
    for name, values in entries.items() if isinstance(entries, dict) else enumerate(entries):
        if not isinstance(values, dict):
            raise PwsError(f"{where} {name!r} must be a mapping; got {shown(values)}.")
        known = {field.name: values[field.name] for field in fields(kind) if field.name in values}
        typed(kind, known, f"{where} {name!r}")


def parser_says(error: Exception) -> str:
    """A parser's message in a line, in our words."""
    if isinstance(error, ArithmeticError):
        return f"a number is beyond what a float can be: {one_line(error)}"
    message = one_line(error).replace("the following arguments are required", "missing")
    return re.sub(r'Parser key "([^"]*)":', r"\1:", message)


@cache
def _parser(kind: Any) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind, required=True)
    return parser
