"""A run's `metrics.csv`: appended by whole lines, so that no full disk or interruption leaves half a row."""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from pws._errors import PwsError
from pws._files import write_whole

Row = Mapping[str, Any]


class MetricsFile(Logger):
    """Lightning's CSVLogger with rows that are there or not, and that goes on with the `rows` of a resumed run.

    A new column writes the file anew, beside the old one; other rows are appended, and what an error left of one is cut off.
    """

    NAME: Final = "metrics.csv"

    def __init__(self, folder: Path, rows: Sequence[Row] = ()) -> None:
        super().__init__()
        self.path = folder / self.NAME
        self._waiting: list[Row] = list(rows)
        self._columns: list[str] = []
        self._content = b""
        """Whole rows that belong at byte `_end`, where the file ends; at 0 they are the whole file."""
        self._end = 0

    @property
    def name(self) -> str:
        """None: the file stands in the run's folder."""
        return ""

    @property
    def version(self) -> str:
        """None: a run has one file."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: recipe.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Keep a row until `save`."""
        numbers = {key: value.item() if isinstance(value, Tensor) else value for key, value in metrics.items()}
        self._waiting.append({**numbers, "step": step})

    @rank_zero_only
    def save(self) -> None:
        """Write the rows that wait, behind those that an error or an interruption kept from being written."""
        self._write()
        if not self._waiting:
            return
        columns, rows, end = (
            sorted({*self._columns, *(key for row in self._waiting for key in row)}),
            self._waiting,
            self._end,
        )
        if columns != self._columns or not self.path.is_file():
            rows, end = [dict(zip(columns, columns, strict=True)), *self._written(), *rows], 0
        # Together, and before the file is touched: writing the same bytes to the same place again does no harm.
        self._columns, self._content, self._end, self._waiting = columns, _lines(columns, rows), end, []
        self._write()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what waits."""
        self.save()

    def _written(self) -> list[Row]:
        if not self._end or not self.path.is_file():
            return []
        return list(csv.DictReader(io.StringIO(self.path.read_bytes()[: self._end].decode(), newline="")))

    def _write(self) -> None:
        if not self._content:
            return
        if self._end == 0:
            write_whole(self.path, self._content)
        else:
            self._append()
        self._content, self._end = b"", self._end + len(self._content)

    def _append(self) -> None:
        with self.path.open("rb+", buffering=0) as file:
            file.seek(self._end)
            left = memoryview(self._content)
            try:
                while left:
                    left = left[file.write(left) :]
            except BaseException:
                file.truncate(self._end)
                raise


def _lines(columns: Sequence[str], rows: Sequence[Row]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns).writerows(rows)
    return text.getvalue().encode()


def rows_before(path: Path, step: int) -> tuple[list[Row], int]:
    """The rows of a metrics file before `step`, where a resumed run goes on; and how many lines are damaged.

    Raises:
        PwsError: the file has a line of columns that is not one, or can't be read.
    """
    if not path.exists():
        return [], 0
    try:
        *lines, tail = path.read_bytes().decode(errors="replace").split("\n")
    except OSError as error:
        raise PwsError(f"cannot read {path}: {error.strerror}. Move it away, and --resume goes on.") from error
    if not lines:  # nothing but the start of the first line, if that
        return [], int(tail != "")
    columns = _cells(lines[0])
    if columns is None or "step" not in columns or len(set(columns)) < len(columns):
        raise PwsError(
            f"{path} must start with a line of columns, one of them step; got {lines[0].strip()[:60]!r}. It is damaged: move "
            "it away, and --resume goes on with a new one."
        )
    rows = [_row(columns, line) for line in lines[1:]]
    whole = [row for row in rows if row is not None]
    kept: list[Row] = [
        {key: cell for key, cell in row.items() if cell != ""} for row in whole if int(row["step"]) < step
    ]
    return kept, len(rows) - len(whole) + (tail != "")


def _row(columns: list[str], line: str) -> dict[str, str] | None:
    """The cells by column; None unless all of them are there and numbers."""
    cells = _cells(line)
    if cells is None or len(cells) != len(columns):
        return None
    row = dict(zip(columns, cells, strict=True))
    try:
        int(row["step"])
        for cell in cells:
            float(cell or "0")
    except ValueError:
        return None
    return row


def _cells(line: str) -> list[str] | None:
    try:
        return next(csv.reader([line.rstrip("\r")]), None)
    except csv.Error:
        return None
