"""Values held to types by jsonargparse, with one wording of its errors for files and flags."""

from __future__ import annotations

import re
from argparse import ArgumentError
from copy import deepcopy
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Final

from jsonargparse import ArgumentParser

from pws._errors import PwsError, one_line, shown

PARSER_ERRORS: Final = (ArgumentError, TypeError, ValueError, ArithmeticError)
"""What jsonargparse raises for a value: its own error, or that of a conversion, as of 10 ** 400 to a float."""


def parse_as(kind: Any, value: Any, where: str) -> Any:
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
        message = parser_message(error).removeprefix("value: ").replace("value.", "")
        raise PwsError(f"{where}: {message}.") from error
    return parser.instantiate(parsed)["value"]


def check_entries(kind: type, entries: Any, where: str) -> None:
    """Raise `PwsError` unless `entries`, a list or a mapping, are mappings with all that the dataclass `kind` has, and more."""
    if not isinstance(entries, list | dict):
        raise PwsError(f"{where} must be a list; got {shown(entries)}.")
    for name, values in entries.items() if isinstance(entries, dict) else enumerate(entries):
        if not isinstance(values, dict):
            raise PwsError(f"{where} {name!r} must be a mapping; got {shown(values)}.")
        known = {field.name: values[field.name] for field in fields(kind) if field.name in values}
        parse_as(kind, known, f"{where} {name!r}")


def parser_message(error: Exception) -> str:
    """A parser's message in a line, in our words."""
    if isinstance(error, ArithmeticError):
        return f"a number is beyond what a float can be: {one_line(error)}"
    message = one_line(error).replace("the following arguments are required", "missing")
    nested = re.search(r'Parser key "([^"]*)": .*NestedArg\(key=\'([^\']*)\'', message)
    if nested:  # jsonargparse takes what is behind a dot for a part of the value
        return "there is no option --{0}.{1}: {0} takes one value".format(*nested.groups())
    message = re.sub(
        r"(Expected a str\. Got value: [\w.+-]+)$", r"\1 (put it in quotes)", message
    )  # YAML reads numbers
    return re.sub(r'Parser key "([^"]*)":', r"\1:", message)


@cache
def _parser(kind: Any) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind, required=True)
    return parser
