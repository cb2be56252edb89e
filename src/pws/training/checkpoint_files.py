"""How a new checkpoint, a file or a folder, takes the place of the one before; at any time one of the two is there."""

from __future__ import annotations

import shutil
from pathlib import Path

from pws.training.checkpoints import BEFORE, LAST


def put_folder(new: Path, path: Path) -> None:
    """Rename the folder `new` to `path`."""
    make_way(path, folder=True)
    new.rename(path)
    tidy(path)


def make_way(path: Path, *, folder: bool) -> None:
    """Move away what is in the way of a new file or folder: `last.ckpt` becomes `before.ckpt`. A file replaces a file."""
    if path.name == LAST and path.exists():
        before = path.with_name(BEFORE)
        if path.is_dir() or before.is_dir():
            _remove(before)
        path.rename(before)
    elif path.is_dir() or (folder and path.exists()):
        path.rename(_old(path))


def tidy(path: Path) -> None:
    """Remove what `make_way` moved away, once the new one is in its place."""
    _remove(_old(path))


def restore(path: Path) -> None:
    """Bring back what was about to be replaced when the process ended."""
    old = _old(path)
    if old.exists() and not path.exists():
        old.rename(path)
    tidy(path)


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
