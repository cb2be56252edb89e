"""How a new checkpoint, a file or a folder, takes the place of the one before; at any time one of the two is there."""

from __future__ import annotations

import shutil
from pathlib import Path

from pws.training.checkpoints import BEFORE, LAST


def put_folder(new: Path, path: Path) -> None:
    """Rename the folder `new` to `path`."""
    make_way(path)
    old = _old(path)
    if path.exists():
        path.rename(old)
    new.rename(path)
    _remove(old)


def make_way(path: Path) -> None:
    """Make `last.ckpt` `before.ckpt`; a file then replaces `path` by being renamed."""
    if path.name == LAST and path.exists():
        before = path.with_name(BEFORE)
        if path.is_dir() or before.is_dir():
            _remove(before)
        path.rename(before)


def restore(path: Path) -> None:
    """Bring back what `put_folder` was about to replace when the process ended."""
    old = _old(path)
    if old.exists() and not path.exists():
        old.rename(path)
    _remove(old)


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
