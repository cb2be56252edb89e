"""What the command line tells of an error: a line of its own, and the lines of the user's code that it came from."""

from __future__ import annotations

import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Final

from pws._errors import PwsError, memory_ran_out, one_line, reason_of

FRAMES: Final = 2
"""The innermost lines of the user's code that are shown: where a function was entered and where it failed."""
_LIBRARIES: Final = [
    str(Path(__file__).parent),
    *(sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib")),
]
_GIVEN: Final[set[str]] = set()
"""Folders and files of the models that a command was given: installed packages too."""


def note_code_of_others(module: ModuleType) -> None:
    """From now on the frames of this module, and of the package around it, are shown in errors."""
    package = sys.modules[module.__name__.partition(".")[0]]
    if package.__name__ != "pws" and package.__file__ is not None:
        _GIVEN.update(getattr(package, "__path__", [package.__file__]))


def note_own_code(folder: Path) -> None:
    """From now on the frames of the code in this folder are not shown in errors."""
    _LIBRARIES.append(str(folder))


def frames_of_others(error: BaseException) -> list[str]:
    """A line for each of the innermost frames in code that is not of pws or a library, of the first error of a chain."""
    for cause in reversed(list(_chain(error))):
        frames = [frame for frame in traceback.extract_tb(cause.__traceback__) if _is_of_others(frame.filename)]
        if frames:
            return [f'  File "{f.filename}", line {f.lineno}, in {f.name}: {f.line}' for f in frames[-FRAMES:]]
    return []


def message_of(error: BaseException) -> str | None:
    """Our line for an error that bad input or the machine can cause; None for any other."""
    full = next((cause for cause in _chain(error) if memory_ran_out(cause)), None)
    if full is not None:
        return f"memory ran out: {_last_line(full)}. Take a smaller network, batch or image, or a machine with more."
    if isinstance(error, PwsError):
        return _last_line(error)
    if isinstance(error, OSError):
        return f"{error}. Check the path, its permissions and the space on the disk."
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        return f"a loader process died, as they do when memory runs out: {one_line(error)} Lower --data.workers."
    return None


def reason_with_frame(error: BaseException) -> str:
    """`reason_of`, and where in the code of others it was."""
    return " at ".join([reason_of(error), *(frame.strip() for frame in frames_of_others(error)[-1:])])


def _last_line(error: BaseException) -> str:
    """A loader process's error arrives with its traceback as text: the last of it is the error."""
    text = str(error).strip()
    if "Original Traceback" not in text:
        return text or type(error).__name__
    return text.splitlines()[-1].partition(": ")[2] or type(error).__name__


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _is_of_others(filename: str) -> bool:
    if filename.startswith("<"):
        return False
    return any(filename.startswith(given) for given in _GIVEN) or not any(
        filename.startswith(lib) for lib in _LIBRARIES
    )
