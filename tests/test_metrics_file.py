"""The run's metrics: whole rows, whatever ends the process, and a resumed run goes on behind the whole ones."""

from __future__ import annotations

import csv
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pws._errors import PwsError
from pws.training.metrics_file import MetricsFile, rows_before


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def filled(folder: Path, rows: int = 3) -> MetricsFile:
    metrics = MetricsFile(folder)
    for step in range(rows):
        metrics.log_metrics({"loss": torch.tensor(0.5 + step), "epoch": step // 2}, step)
        metrics.save()
    return metrics


def test_rows_are_appended_and_a_new_column_keeps_the_old_rows(tmp_path: Path) -> None:
    metrics = filled(tmp_path)
    metrics.log_metrics({"accuracy, top": 0.25}, 3)
    metrics.save()
    metrics.log_metrics({"loss": 9.0}, 4)
    metrics.finalize("success")
    assert read(tmp_path / "metrics.csv") == [
        {"accuracy, top": "", "epoch": "0", "loss": "0.5", "step": "0"},
        {"accuracy, top": "", "epoch": "0", "loss": "1.5", "step": "1"},
        {"accuracy, top": "", "epoch": "1", "loss": "2.5", "step": "2"},
        {"accuracy, top": "0.25", "epoch": "", "loss": "", "step": "3"},
        {"accuracy, top": "", "epoch": "", "loss": "9.0", "step": "4"},
    ]
    assert list(tmp_path.iterdir()) == [tmp_path / "metrics.csv"]


def test_a_resumed_run_goes_on_behind_the_rows_before_its_step(tmp_path: Path) -> None:
    filled(tmp_path, 5)
    rows, damaged = rows_before(tmp_path / "metrics.csv", 3)
    assert damaged == 0
    resumed = MetricsFile(tmp_path, rows)
    assert len(read(tmp_path / "metrics.csv")) == 5, "nothing is touched before there is something to write"
    resumed.log_metrics({"loss": 7.0}, 3)
    resumed.save()
    assert [row["loss"] for row in read(tmp_path / "metrics.csv")] == ["0.5", "1.5", "2.5", "7.0"]


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], list[str], int]] = {
    "whole": (lambda raw: raw, ["0", "1", "2"], 0),
    "the last number cut": (lambda raw: raw[:-3], ["0", "1"], 1),
    "the last row cut": (lambda raw: raw[:-7], ["0", "1"], 1),
    "its end of line cut": (lambda raw: raw[:-1], ["0", "1"], 1),
    "half a row more": (lambda raw: raw + b"1,3.", ["0", "1", "2"], 1),
    "zeros behind": (lambda raw: raw + bytes(20), ["0", "1", "2"], 1),
    "bytes that are no text": (lambda raw: raw + b"\xff\xfe\r\n", ["0", "1", "2"], 1),
    "a cell too many": (lambda raw: raw.replace(b"1.5", b"1,5"), ["0", "2"], 1),
    "a cell that is no number": (lambda raw: raw.replace(b"1.5", b"1x5"), ["0", "2"], 1),
    "a step that is no number": (lambda raw: raw.replace(b"1.5,1", b"1.5,q"), ["0", "2"], 1),
    "an empty line": (lambda raw: raw.replace(b"0,1.5", b"\r\n0,1.5"), ["0", "1", "2"], 1),
    "an open quote": (lambda raw: raw.replace(b"0,1.5", b'"0,1.5'), ["0", "2"], 1),
    "columns alone": (lambda raw: raw[: raw.index(b"\n") + 1], [], 0),
    "half the columns": (lambda raw: raw[:5], [], 1),
    "nothing": (lambda raw: b"", [], 0),
}


@pytest.mark.parametrize(("damage", "steps", "lines"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_lines_are_left_out_and_counted(
    damage: Callable[[bytes], bytes], steps: list[str], lines: int, tmp_path: Path
) -> None:
    filled(tmp_path)
    path = tmp_path / "metrics.csv"
    path.write_bytes(damage(path.read_bytes()))
    before = path.read_bytes()
    rows, damaged = rows_before(path, 9)
    assert ([row["step"] for row in rows], damaged) == (steps, lines)
    assert path.read_bytes() == before
    assert [row["step"] for row in rows_before(path, 1)[0]] == steps[:1]


@pytest.mark.parametrize(
    "columns",
    [b"epoch,loss,stap", b"a,a,step", b"\xff\xfe", b"", b"<html>", b"\x00\x00"],
    ids=lambda value: repr(value),
)
def test_a_file_without_its_columns_is_refused(columns: bytes, tmp_path: Path) -> None:
    filled(tmp_path)
    path = tmp_path / "metrics.csv"
    raw = path.read_bytes()
    path.write_bytes(columns + raw[raw.index(b"\r\n") :])
    with pytest.raises(PwsError, match="must start with a line of columns"):
        rows_before(path, 9)


def test_a_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").mkdir()
    with pytest.raises(PwsError, match="Move it away"):
        rows_before(tmp_path / "metrics.csv", 9)


@pytest.mark.parametrize("room", range(0, 200, 7))
def test_a_disk_that_fills_leaves_whole_rows(room: int, tmp_path: Path) -> None:
    """No file may be longer than `room` bytes; then somebody makes room."""
    path, metrics, failed = tmp_path / "metrics.csv", MetricsFile(tmp_path), 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        for step in range(12):
            metrics.log_metrics({"loss": step / 3, **({"new": 1.0} if step == 6 else {})}, step)
            try:
                metrics.save()
            except OSError:
                failed += 1
                assert not path.exists() or path.read_bytes().endswith(b"\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert failed > 0
    metrics.finalize("failed")
    assert [row["step"] for row in read(path)] == [str(step) for step in range(12)]
    assert rows_before(path, 99)[1] == 0
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("new_column", [False, True])
@pytest.mark.parametrize("written", [False, True])
def test_an_interrupted_save_neither_loses_nor_doubles_rows(
    written: bool, new_column: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = filled(tmp_path)
    metrics.log_metrics({"loss": 3.5, "epoch": 1, **({"new": 1.0} if new_column else {})}, 3)
    write = MetricsFile._write

    def interrupted(self: MetricsFile) -> None:
        """Ctrl-C before the file is written, or between that and what is noted of it."""
        content, end = self._content, self._end
        if not content:
            return
        if written:
            write(self)
            self._content, self._end = content, end
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(MetricsFile, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            metrics.save()
    metrics.finalize("failed")
    assert [row["loss"] for row in read(tmp_path / "metrics.csv")] == ["0.5", "1.5", "2.5", "3.5"]
