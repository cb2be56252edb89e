"""Result files: what was measured, on what."""

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


def write_result(path: Path, command: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """Write JSON, whole or not at all: the command, the commit, the device and the versions, then the result.

    Returns the content as the file gives it back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"command": command, "commit": commit(), "device": _device(), "versions": versions()}
    text = json.dumps({**head, **result}, indent=1, allow_nan=False)
    write_whole(path, f"{text}\n")
    content: dict[str, Any] = json.loads(text)
    return content


def read_result(path: Path, key: str, kind: type, entry: type) -> dict[str, Any] | None:
    """What an earlier run left at `path`, to go on with; None if there is nothing.

    Raises:
        PwsError: the file is not a result of this command. That has, called `key`, entries in a list or a dict (`kind`),
            each with the fields of `entry`, a dataclass, and perhaps more.
    """
    if not path.is_file():
        return None
    found = _content(path)
    if not isinstance(found, dict) or not isinstance(found.get(key), kind):
        by = f"a file of `{found['command']}`" if isinstance(found, dict) and "command" in found else "another file"
        raise PwsError(
            f"the results go to {path}, and are taken up from there; it holds {by}, without {key!r}. "
            "Choose another folder with --out, or move that file away."
        )
    check_entries(entry, found[key], f"{path} is damaged, move it away: {key}")
    return found


def check_own(path: Path, command: str) -> None:
    """Raise `PwsError` if there is a file at `path` that this command has not made: its own result is measured anew."""
    found = _content(path) if path.exists() else {"command": command}
    if not isinstance(found, dict) or found.get("command") != command:
        raise PwsError(f"{path} exists already, and is no result of `{command}`. Choose another folder with --out.")


def _content(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None


def commit() -> str:
    """Of the checkout that pws runs from, "dirty" if it has changes."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout
    except OSError:  # there is no git
        found = ""
    return found.strip() or "not a checkout"


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
