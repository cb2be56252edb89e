"""Where output goes: full disks, closed and full streams, locales; files are written whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pws import _files as files
from pws.cli import main

PWS = f"{sys.executable} -m pws"
DIAGNOSE = f"{PWS} diagnose --model=pws.models.small:resnet18 --image-size=16 --batch-size=2"
STREAMS = {
    "full": (f"{DIAGNOSE} > /dev/full", 2, "pws: the output can't be written: No space left on device"),
    "full usage": (f"{PWS} > /dev/full", 2, "pws: the output can't be written"),
    "closed": (f"{DIAGNOSE} >&-", 0, ""),
    "a reader that leaves": (f"set -o pipefail; {DIAGNOSE} | head -1", 0, ""),
    "full errors": (f"{PWS} nonsense 2> /dev/full", 2, ""),
    "closed errors": (f"{PWS} nonsense 2>&-", 2, ""),
    "ascii": (f"PYTHONIOENCODING=ascii {DIAGNOSE}", 0, ""),
    "C": (f"LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {DIAGNOSE}", 0, ""),
    "an error in ascii": (f"PYTHONIOENCODING=ascii {PWS} évaluer", 2, "pws: unknown command '\\xe9valuer'"),
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(("command", "code", "says"), STREAMS.values(), ids=STREAMS)
def test_streams(command: str, code: int, says: str, tmp_path: Path) -> None:
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ))
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(says)
    assert done.stderr.count("\n") == bool(says), done.stderr


CONVERT = ("convert", "--model=pws.models.small:resnet18", "--image-size=16", "--batch-size=2")


@pytest.mark.parametrize("which", ["weights.pt", "load.py", "plan.json", "plan.txt"])
def test_a_conversion_on_a_full_disk_leaves_nothing(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = files.write_whole

    def full(path: Path, content: Any) -> None:
        if path.name == which:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, content)

    arguments = [*CONVERT, f"--out={tmp_path / 'new' / 'out'}"]
    with monkeypatch.context() as disk:
        disk.setattr(files, "write_whole", full)
        assert main(arguments) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"pws: .*No space left on device.*", said.splitlines()[-1])
    assert [path for path in tmp_path.rglob("*") if path.name != "new"] == []
    assert main(arguments) == 0
    written = sorted(path.name for path in (tmp_path / "new" / "out").iterdir())
    assert written == ["load.py", "plan.json", "plan.txt", "weights.pt"]


def test_an_empty_folder_is_filled_and_a_link_to_one(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert main([*CONVERT, f"--out={tmp_path / 'empty'}"]) == 0
    assert len(list((tmp_path / "empty").iterdir())) == 4


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--out="],
        ["diagnose", ""],
        ["diagnose", "fashion-mnist-allconv-bn", "--out="],
        [*CONVERT, "--out="],
        ["evaluate", ""],
        ["export", "", "--format=onnx"],
        ["train", ""],
        ["train", "fashion-mnist-allconv-pws", "--runs="],
        ["bench", "accuracy", ""],
        ["bench", "speed", "--model=pws.models.small:resnet18", "--out="],
        ["demo", "--out=a\0b"],
    ],
    ids=" ".join,
)
def test_empty_words(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert "must not be empty" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        (["demo", "--epochs=1", "--out=mine"], "demo.png"),
        (["demo", "--epochs=1", "--out=mine"], "demo.txt"),
        (["bench", "speed", "--model=pws.models.small:resnet18", "--out=mine"], "speed.json"),
        (["diagnose", "--model=pws.models.small:resnet18", "--image-size=16", "--out=mine/a.html"], "a.html"),
        (["diagnose", "--model=pws.models.small:resnet18", "--image-size=16", "--out=mine/a.png"], "a.png"),
        ([*CONVERT, "--out=mine"], "weights.pt"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else value,
)
def test_nothing_of_others_is_overwritten(
    arguments: list[str],
    file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / file).write_text("mine")
    assert main(arguments) == 2
    assert str(Path("mine")) in capsys.readouterr().err
    assert (tmp_path / "mine" / file).read_text() == "mine"
    assert len(list((tmp_path / "mine").iterdir())) == 1
