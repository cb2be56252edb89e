"""Result files: what was measured, on what. JSON with a line per entry, so that a diff can be read."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pws._errors import PwsError
from pws._files import write_whole
from pws.training.parsing import check_entries
from pws.training.summary import versions

Result = dict[str, Any]
"""The content of a result file."""


def write_result(path: Path, command: str, result: Mapping[str, Any]) -> Result:
    """Write JSON, whole or not at all: the command, the commit, the device and the versions, then the result.

    Returns the content as the file gives it back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"command": command, "commit": commit(), "device": _device(), "versions": versions()}
    text = lines_of({**head, **result})
    write_whole(path, f"{text}\n")
    content: Result = json.loads(text)
    return content


def lines_of(value: Any, indent: int = 0) -> str:
    """JSON in which only what holds mappings is broken up: a line per entry.

    Examples:
        >>> print(lines_of({"rates": [0.1, 0.2], "cells": [{"row": "bn"}, {"row": "pws"}]}))
        {
         "rates": [0.1, 0.2],
         "cells": [
          {"row": "bn"},
          {"row": "pws"}
         ]
        }
    """
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    if not any(isinstance(part, Mapping) or _holds_mappings(part) for part in parts):
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    space = " " * (indent + 1)
    lines = [space + lines_of(part, indent + 1) for part in parts]
    if isinstance(value, Mapping):
        lines = [
            f"{space}{json.dumps(str(key), ensure_ascii=False)}: {line.lstrip()}"
            for key, line in zip(value, lines, strict=True)
        ]
    start, end = "{}" if isinstance(value, Mapping) else "[]"
    return f"{start}\n" + ",\n".join(lines) + f"\n{' ' * indent}{end}"


def _holds_mappings(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(part, Mapping) for part in value)


def rounded(value: float, digits: int = 5) -> float:
    """`value` to so many significant digits."""
    return float(f"{value:.{digits}g}")


def read_result(path: Path, key: str, kind: type, entry: type) -> Result | None:
    """What an earlier run left at `path`, to go on with; None if there is nothing.

    Raises:
        PwsError: the file is not a result of this command. That has, called `key`, entries in a list or a dict (`kind`),
            each with the fields of `entry`, a dataclass, and perhaps more.
    """
    if not path.is_file():
        return None
    found = content_of(path)
    if not isinstance(found, dict) or not isinstance(found.get(key), kind):
        by = f"a file of `{found['command']}`" if isinstance(found, dict) and "command" in found else "another file"
        raise PwsError(
            f"the results go to {path}, and are taken up from there; it holds {by}, without {key!r}. "
            "Choose another folder with --out, or move that file away."
        )
    check_entries(entry, found[key], f"{path} is damaged, move it away: {key}")
    return found


def content_of(path: Path) -> Any:
    """What the JSON file at `path` holds; None if it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None


def commit() -> str:
    """The commit of the checkout that pws runs from, "dirty" if it has changes."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout
    except OSError:  # there is no git
        found = ""
    return found.strip() or "not a checkout"


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
