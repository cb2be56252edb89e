"""A run is never lost: full disks, kills, damaged files, two processes in one folder."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pws.cli import main
from pws.training import load_recipe
from pws.training.classifier import Classifier
from pws.training.metrics_file import MetricsFile
from pws.training.run_folder import LOCK

EPOCHS = 4
TRAIN = (
    *("train", "fashion-mnist-allconv-pws", "--data.name=digits", "--data.image_size=12", "--data.train_images=64"),
    *("--data.batch_size=32", "--model.width=0.08", "--trainer.accelerator=cpu", "--trainer.devices=1"),
    f"--trainer.epochs={EPOCHS}",
)
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(folder: Path, *flags: str) -> int:
    return main([*TRAIN, f"--runs={folder.parent}", f"--name={folder.name}", *flags])


def resume(folder: Path, *flags: str) -> int:
    return main(["train", str(folder), "--resume", *flags])


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return found


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert start(folder) == 0
    return folder


@pytest.fixture
def stopped(whole: Path, tmp_path: Path) -> Path:
    """The same, as if killed before it said that it is finished."""
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    return tmp_path / "run"


def assert_like(folder: Path, whole: Path) -> None:
    """The run ended as the one that nothing happened to."""
    assert (
        json.loads((folder / "summary.json").read_text())["metrics"]
        == json.loads((whole / "summary.json").read_text())["metrics"]
    )
    found, wanted = weights(folder), weights(whole)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert rows(folder) == rows(whole)
    assert not list(folder.rglob("*.partial*"))


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file can be longer than `size` bytes, as on a disk that is full there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Below the size of recipe.yaml, of TensorBoard's file, of metrics.csv, of summary.json, of a checkpoint.
@pytest.mark.parametrize("room", [580, 650, 1000, 1500, 100_000])
def test_a_full_disk_in_the_run(room: int, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    with room_for(room):
        assert start(folder) == 2
    error = capsys.readouterr().err
    assert os.strerror(errno.EFBIG) in error
    assert error.count("\n") == 1
    assert "--resume" not in error
    assert not folder.exists(), "it holds no checkpoint, and blocks the next try"
    assert start(folder) == 0
    assert_like(folder, whole)


def test_a_disk_that_fills_behind_a_checkpoint(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, keep, disk = tmp_path / "run", MetricsFile.log_metrics, ExitStack()

    def keep_and_fill(self: MetricsFile, metrics: dict[str, Any], step: int | None = None) -> None:
        if list(folder.glob("checkpoints/*")):
            disk.enter_context(room_for(100_000))
        keep(self, metrics, step)

    with disk, monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "log_metrics", keep_and_fill)
        assert start(folder) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"pws: the run stopped: File too large: .*best\.ckpt\. .* --resume goes on\.\n", error)
    assert not list(tmp_path.rglob("*.partial*"))
    assert resume(folder) == 0
    assert_like(folder, whole)


@pytest.mark.parametrize("room", [0, 100, 600, 1000, 100_000])
def test_a_full_disk_when_it_is_resumed(
    room: int, whole: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = stopped / "checkpoints"
    (checkpoints / "before.ckpt").replace(checkpoints / "last.ckpt")
    before = files(stopped)
    with room_for(room):
        assert resume(stopped, "--trainer.early_stop=99") == 2  # another recipe.yaml
    assert capsys.readouterr().err.count("\n") == 1
    after = files(stopped)
    for path in checkpoints.iterdir():
        assert after[path] == before[path]
    assert load_recipe(stopped).trainer.early_stop == (99 if room > len(before[stopped / "recipe.yaml"]) else None)
    assert resume(stopped) == 0
    assert_like(stopped, whole)


VANISHED = {
    "the folder": ["checkpoints"],
    "the files": ["checkpoints/last.ckpt", "checkpoints/before.ckpt", "checkpoints/best.ckpt"],
    "the folder and the metrics": ["checkpoints", "metrics.csv"],
}


@pytest.mark.parametrize("names", VANISHED.values(), ids=VANISHED)
def test_a_run_whose_checkpoints_vanished_does_not_start_again(
    names: list[str], stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in names:
        (shutil.rmtree if (stopped / name).is_dir() else os.unlink)(stopped / name)
    before = files(stopped)
    assert resume(stopped) == 2
    printed = capsys.readouterr()
    assert "those of" in printed.err
    assert "are gone" in printed.err
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert files(stopped) == before


def test_a_run_stopped_in_its_first_epoch_starts_again_and_says_so(
    whole: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in [*(stopped / "checkpoints").iterdir(), stopped / "metrics.csv"]:
        path.unlink()
    assert resume(stopped) == 0
    out = capsys.readouterr().out
    assert out.startswith("no checkpoint was written yet, the run starts again: training")
    assert "resuming" not in out
    assert_like(stopped, whole)


def test_the_best_checkpoint_stands_in_where_the_last_is_damaged_and_none_is_before_it(
    whole: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = stopped / "checkpoints"
    (checkpoints / "before.ckpt").replace(checkpoints / "best.ckpt")
    os.truncate(checkpoints / "last.ckpt", 5000)
    assert resume(stopped) == 0
    assert re.search(r"Going on from \S+best\.ckpt", capsys.readouterr().err)
    assert_like(stopped, whole)


def test_only_the_best_checkpoint_is_left(whole: Path, stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = stopped / "checkpoints"
    (checkpoints / "last.ckpt").unlink()
    (checkpoints / "before.ckpt").replace(checkpoints / "best.ckpt")
    assert resume(stopped) == 0
    assert "last.ckpt does not exist. Going on from" in capsys.readouterr().err
    assert_like(stopped, whole)


BROKEN: dict[str, tuple[str, bytes, str]] = {
    **{
        f"summary {content!r}": ("summary.json", content, "Remove that file: --resume goes on from the checkpoints")
        for content in (b"", b"{", b"null", b"[]", b"5", b"{}", b"\xff\xfe", b"[" * 100_000, bytes(300), b'{"status": ')
    },
    **{
        f"recipe {content[:20]!r}": ("recipe.yaml", content, "recipe")
        for content in (
            *(
                b"",
                b"null",
                b"[]",
                b"5",
                b"words",
                b"{",
                b"model: [",
                b"\xff\xfe\x00",
                bytes(100),
                b"model: 5",
                b"optim: {lr: fast}",
            ),
            *(
                b"{1: 2}",
                b"[" * 400,
                b"!!python/object:os.system {}",
                b"seed: 2001-99-99",
                b"a: &a [*a]",
                b"seed: !!int x",
            ),
        )
    },
    **{
        f"metrics {content!r}": ("metrics.csv", content, "move it away")
        for content in (b"no columns\r\n1\r\n", b"\xff\xfe\n", b"\n\n", b"step,step\n")
    },
}


@pytest.mark.parametrize(("name", "content", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_of_the_run_is_one_error_and_nothing_changes(
    name: str, content: bytes, words: str, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (stopped / name).write_bytes(content)
    before = files(stopped)
    # With the recipe that it was started with, where the run's own is broken.
    arguments = [*TRAIN, f"--runs={stopped.parent}", f"--name={stopped.name}", "--resume"]
    commands = [arguments, ["train", str(stopped), "--resume"]] if name == "recipe.yaml" else [arguments]
    readers = [["evaluate", str(stopped)], ["export", str(stopped)], ["diagnose", str(stopped)]]
    for command in [*commands, *(readers if name == "recipe.yaml" else [])]:
        assert main(command) == 2, command
        printed = capsys.readouterr()
        assert words in printed.err
        assert str(stopped / name) in printed.err
        assert printed.err.count("\n") <= 3
        assert "Traceback" not in printed.err
        assert files(stopped) == before


@pytest.mark.parametrize("name", ["summary.json", "metrics.csv", ".lock"])
def test_a_folder_in_a_files_place_is_one_error(name: str, stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (stopped / name).unlink(missing_ok=True)
    (stopped / name).mkdir()
    assert resume(stopped) == 2
    error = capsys.readouterr().err
    assert str(stopped / name) in error
    assert error.count("\n") == 1


def test_a_damaged_tail_of_the_metrics_is_cut_off_with_a_word(
    whole: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = stopped / "metrics.csv"
    path.write_bytes(path.read_bytes() + b"3,0.1,")
    checkpoints = stopped / "checkpoints"
    (checkpoints / "before.ckpt").replace(checkpoints / "last.ckpt")
    assert resume(stopped) == 0
    assert capsys.readouterr().err == f"pws: 1 damaged line of {path} cut off\n"
    assert_like(stopped, whole)


def test_two_processes_do_not_train_in_one_folder(
    whole: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:

    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(stopped / LOCK)], stdout=subprocess.PIPE, text=True, env=ONE_THREAD
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    before = files(stopped)
    assert resume(stopped) == 2
    error = capsys.readouterr().err
    assert "another one is at work in" in error
    assert error.count("\n") == 1
    assert files(stopped) == before
    holder.send_signal(signal.SIGKILL)  # its child, as a loader process, lives on for a while
    holder.wait()
    assert resume(stopped) == 0
    assert_like(stopped, whole)


HOLD = """
import os, sys, time
from pathlib import Path
from pws.training.run_folder import _take
lock = open(sys.argv[1], "a")
_take(lock, Path("."))
if os.fork() == 0:
    time.sleep(20)
    os._exit(0)
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("command", ["evaluate", "train"])
def test_ctrl_c_while_it_validates_is_130(
    command: str, stopped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if command == "train":
        checkpoints = stopped / "checkpoints"
        (checkpoints / "before.ckpt").replace(checkpoints / "last.ckpt")
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Classifier, "validation_step", interrupt)
    assert main([command, str(stopped), *(["--resume"] if command == "train" else [])]) == 130
    signal.signal(signal.SIGINT, handler)  # Lightning ignores it from then on
    assert capsys.readouterr().err.startswith("pws: interrupted")


def test_an_exit_in_training_is_not_taken_for_ctrl_c(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def leave(*_: object) -> None:
        raise SystemExit(5)

    monkeypatch.setattr(Classifier, "validation_step", leave)
    assert main(["evaluate", str(whole)]) == 2
    assert "it called exit(5)" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "export", "diagnose"])
def test_the_last_checkpoint_stands_in_for_the_best(
    command: str, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that max_steps ended before its first validation has no best one."""
    (stopped / "checkpoints" / "best.ckpt").unlink()
    assert (
        main([command, str(stopped), "--checkpoint=best", *(["--format=safetensors"] if command == "export" else [])])
        == 0
    )
    if command == "export":
        state = load_file(stopped / "model.safetensors")
        last = weights(stopped)
        assert all(torch.equal(state[key], last[f"model.{key}"]) for key in state)
    else:
        assert "last.ckpt" in capsys.readouterr().out
    (stopped / "checkpoints" / "last.ckpt").unlink()
    (stopped / "model.safetensors").unlink(missing_ok=True)
    assert main([command, str(stopped), "--checkpoint=best"]) == 2
    assert "last.ckpt does not exist" in capsys.readouterr().err
