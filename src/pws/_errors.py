"""The errors a user can mend. Each message states the rule, what came, the likely cause and the next step."""

from __future__ import annotations

import difflib
import errno
import re
import reprlib
from collections.abc import Iterable
from typing import Final


class PwsError(ValueError):
    """Base of every error that bad input can cause; the command line prints it and exits with 2."""


class ShapeError(PwsError):
    """A tensor's shape makes the operation meaningless."""


class ToldElsewhereError(PwsError):
    """Another process of the same run tells what is wrong: the command line of this one is silent."""


class StoppedRunError(PwsError):
    """A run stopped for something other than its recipe and data: its folder stays, and --resume goes on, as the error says."""


class UnknownNameError(PwsError):
    """A name that is in no registry."""

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        super().__init__(f"unknown {kind} {name!r}{nearest(str(name), known)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The tail of an error about a misspelt name: the likely ones, and all where they are few or none is likely."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else "."
    return hint if close and len(names) > 24 else f"{hint} Valid: {_listed(names)}"


def _listed(names: list[str]) -> str:
    """The names, those with the same beginning up to a dot together: `seed, data.{name, root}`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        beginning, dot, end = name.rpartition(".")
        groups.setdefault(beginning + dot, []).append(end)
    return ", ".join(
        f"{beginning}{{{', '.join(ends)}}}"
        if beginning and len(ends) > 1
        else ", ".join(beginning + end for end in ends)
        for beginning, ends in groups.items()
    )


def one_line(error: BaseException, longest: int = 500) -> str:
    """The message of another library's error without its line breaks, the class around a type's name, and what is too long."""
    return cut(re.sub(r"<class '(\w+)'>", r"\1", " ".join(str(error).split())), longest)


def shown(value: object) -> str:
    """A value for a message: a file may hold one of any size."""
    return cut(_SHORT.repr(value), 200)


def cut(text: str, longest: int) -> str:
    """`text`, its end replaced by dots if it is longer."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def reason_of(error: BaseException) -> str:
    """What an error of unknown origin says, in a line; that memory ran out, where it did."""
    if isinstance(error, SystemExit):
        return f"it called exit({error.code!r})"
    said = f"{type(error).__name__}: {one_line(error)}".removesuffix(": ")
    return f"memory ran out ({said})" if memory_ran_out(error) else said


def memory_ran_out(error: BaseException) -> bool:
    """Whether this is what the interpreter, the system or torch raise when there is not enough memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))


_NO_MEMORY: Final = re.compile(
    "can't allocate memory|not enough memory|out of memory|bad_alloc|size calculation overflowed|Cannot allocate memory"
    "|numel: integer multiplication overflow|Invalid memory|invalid.* shape .*overflow",
    re.IGNORECASE,
)
_SHORT: Final = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 120, 120
