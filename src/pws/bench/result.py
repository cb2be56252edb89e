"""Result files: what was measured, on what."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pws.training.summary import versions


def write_result(path: Path, command: str, result: Mapping[str, Any]) -> None:
    """Write JSON: the command, the commit, the device and the versions, then the result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"command": command, "commit": commit(), "device": _device(), "versions": versions()}
    path.write_text(json.dumps({**head, **result}, indent=1, allow_nan=False) + "\n")


def commit() -> str:
    """Of the checkout that pws runs from, "dirty" if it has changes."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "not a checkout"


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
