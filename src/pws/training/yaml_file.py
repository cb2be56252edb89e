"""YAML files of users: words to plain values, lists and mappings, or one clear error."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import yaml

from pws._errors import PwsError, UnknownNameError, one_line, shown

LARGEST: Final = 1_000_000
"""Characters of a YAML file, and values in it once its aliases are written out: ten aliases of ten make a gigabyte."""


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
