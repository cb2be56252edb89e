"""Files written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; it takes the place of `path` when the block ends, and goes if the block fails.

    Whatever ends the process, `path` is what it was or the whole new file. The two lie in one folder, for only inside a file
    system a rename is one step. A device or a pipe is written to directly.

    Raises:
        OSError: the file can't be written; it names `path`.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "numbers.txt"
        ...     with written_whole(path) as partial:
        ...         _ = partial.write_text("1 2 3")
        ...     [file.name for file in path.parent.iterdir()]
        ['numbers.txt']
    """
    target = path.resolve()  # a link keeps pointing there
    if target.exists() and not (target.is_file() or target.is_dir()):
        yield path
        return
    partial = partial_of(target)
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        if error.errno is None:  # a library's own
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """Where this process writes what becomes `path`; the suffix stays, exporters look at it."""
    return path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; text is UTF-8.

    Raises:
        OSError: the file can't be written; it names `path`.
    """
    with written_whole(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def remove_partials(path: Path) -> None:
    """Remove what killed processes left of `path`; nobody else may be writing it."""
    for left in path.parent.glob(f".{path.stem}.*.partial{path.suffix}"):
        left.unlink()


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """Give an empty folder beside `folder` to write to; it takes that place when the block ends, and goes if the block fails.

    The folders above are made. An empty folder may stand in the place.

    Raises:
        OSError: a file can't be written, or the folder holds something.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(folder)
    partial.mkdir()
    try:
        yield partial
        partial.replace(folder)
    except OSError as error:
        if error.errno is None:  # a library's own
            raise
        raise OSError(error.errno, error.strerror, str(folder)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_folder(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Write a new folder of files whole or not at all, as `folder_written_whole` does."""
    with folder_written_whole(folder) as partial:
        for name, content in files.items():
            write_whole(partial / name, content)
