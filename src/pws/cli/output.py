"""Where a command prints: an output that ends before the command does ends the printing, not the work."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast


class Output:
    """A stream whose first failing write is kept as `error`; what follows is dropped.

    A run is worth more than its progress lines: `pws train ... | head` trains to the end.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.error: OSError | None = None
        # Closed from the start (>&-): the next file that is opened would take its number, and all that is printed.
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if self._stream.errors == "strict" and hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors="backslashreplace")  # a locale may lack the characters of a table or a path

    def write(self, text: str) -> int:
        """Print."""
        if self.error is None:
            try:
                return self._stream.write(text)
            except OSError as error:
                self._end(error)
        return len(text)

    def flush(self) -> None:
        """Hand on what is printed."""
        if self.error is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._end(error)

    def _end(self, error: OSError) -> None:
        self.error = error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # or the interpreter would fail again when it flushes at its end
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def guarded_output() -> Iterator[Output]:
    """Print through `Output`; gives that of stdout."""
    before = sys.stdout, sys.stderr
    guarded = Output(before[0]), Output(before[1])
    sys.stdout, sys.stderr = cast(tuple[TextIO, TextIO], guarded)
    try:
        yield guarded[0]
    finally:
        for output in guarded:
            output.flush()
        sys.stdout, sys.stderr = before
