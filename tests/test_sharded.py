"""Sharded runs (FSDP2): killed and resumed on another number of processes, damaged, on a full disk."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
import torch
from forked import free_port, run_forked
from shared_runs import CLASSIFIER, SHARDED, assert_same_end, child_of, command, last, noise, one_process, run
from small_runs import ONE_THREAD

import pws
from pws._errors import PwsError
from pws.training import load_recipe, train
from pws.training.checkpoints import LAST, load_checkpoint


@pytest.fixture(scope="module", name="noise")
def images_of_noise(tmp_path_factory: pytest.TempPathFactory) -> str:
    return noise(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def killed(noise: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes, one of which was killed within the second epoch, behind its first checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "killed"
    log = (folder.parent / "log").open("w+")
    process = subprocess.Popen(command(folder, *CLASSIFIER, noise, *SHARDED), stdout=log, stderr=log, env=ONE_THREAD)
    deadline = time.monotonic() + 200
    while not (folder / "checkpoints" / "before.ckpt").exists():
        assert process.poll() is None, (folder.parent / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(child_of(process.pid), signal.SIGKILL)
    process.wait(timeout=100)
    assert not (folder / "summary.json").exists()
    said = (folder.parent / "log").read_text()
    assert process.returncode == 2, said
    assert "another process of the run ended" in said
    return folder


@pytest.mark.parametrize("devices", [1, 2])
def test_a_killed_process_loses_nothing(killed: Path, noise: str, tmp_path: Path, devices: int) -> None:
    """Resumed sharded on two processes, or whole on one: the end is that of one process from the start."""
    shutil.copytree(killed, tmp_path / "killed")
    train(one_process(*CLASSIFIER, noise), tmp_path / "whole", quiet=True)
    if devices == 1:
        train(one_process(*CLASSIFIER, noise), tmp_path / "killed", resume=True, quiet=True)
    else:
        run(tmp_path / "killed", *CLASSIFIER, noise, *SHARDED, "--resume")
    assert_same_end(tmp_path / "killed", tmp_path / "whole")
    images = torch.randint(256, (4, 3, 12, 12), dtype=torch.uint8)
    found, wanted = (pws.load(tmp_path / name, "last").probabilities(images) for name in ("killed", "whole"))
    torch.testing.assert_close(found, wanted)


PLAIN_SGD: Final = ("--model.method=none", "--optim.momentum=0")


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer", [PLAIN_SGD, (), ("--optim.name=adamw", "--optim.lr=0.01")], ids=["sgd", "momentum", "adamw"]
)
@pytest.mark.parametrize("sharded_first", [True, False])
def test_a_run_changes_its_strategy(
    noise: str, tmp_path: Path, sharded_first: bool, optimizer: tuple[str, ...]
) -> None:
    """Sharded on two processes and resumed whole on one, or the other way; plain SGD has no state."""
    settings = (*CLASSIFIER, noise, *optimizer, "--trainer.epochs=2")
    train(one_process(*settings), tmp_path / "whole", quiet=True)
    folder = tmp_path / "run"
    newest = folder / "checkpoints" / LAST
    for number, sharded in enumerate((sharded_first, not sharded_first)):
        if sharded:
            run_forked(2, free_port(), folder, command(folder, *settings, *SHARDED, *["--resume"] * number)[3:])
        else:
            train(one_process(*settings), folder, resume=bool(number), quiet=True)
        if number == 0:  # the end is gone; before.ckpt is within epoch 2
            (folder / "summary.json").unlink()
            (shutil.rmtree if newest.is_dir() else os.unlink)(newest)
    assert_same_end(folder, tmp_path / "whole", stateless=optimizer == PLAIN_SGD)


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "rest"])
def test_a_damaged_shard_is_named_and_done_without(
    killed: Path, noise: str, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(killed, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / LAST / ("meta.pt" if damage == "rest" else "__1_0.distcp")
    content = file.read_bytes()
    file.write_bytes({"cut": content[:100], "changed": content[:-1] + b"?"}.get(damage, b""))
    if damage == "gone":
        file.unlink()
    with pytest.raises(PwsError, match=file.name):
        load_checkpoint(file.parent)
    train(one_process(*CLASSIFIER, noise), tmp_path / "run", resume=True, quiet=True)
    printed = capsys.readouterr().err
    assert file.name in printed
    assert "before.ckpt" in printed


def test_an_average_of_sharded_weights_is_refused() -> None:
    with pytest.raises(PwsError, match=r"optim\.ema averages whole weights"):
        load_recipe(CLASSIFIER[0], "--trainer.strategy=fsdp2", "--optim.ema=0.9")


def test_each_process_needs_an_image_of_each_part(tmp_path: Path, noise: str) -> None:
    few = one_process(*CLASSIFIER, noise, "--data.validation=0.01", "--data.train_images=96")
    two = replace(few, trainer=replace(few.trainer, devices=2))
    with pytest.raises(PwsError, match="each process needs a validation image at least; there are 1 for 2 processes"):
        train(two, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


FULL_DISK: Final = """
import errno, sys
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from pws.cli import main
written = FileSystemWriter.write_data
def write_data(self, *args):
    if ".last" in str(self.path) and full:
        raise OSError(errno.ENOSPC, "No space left on device")
    full.append(".last" in str(self.path)) if ".last" in str(self.path) else None
    return written(self, *args)
full = []
FileSystemWriter.write_data = write_data
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("room_for_one", [True, False])
def test_a_disk_that_fills_leaves_the_checkpoint_before(tmp_path: Path, noise: str, room_for_one: bool) -> None:
    script, folder = tmp_path / "full.py", tmp_path / "run"
    script.write_text(FULL_DISK.replace("full = []", f"full = {[] if room_for_one else [True]}"))
    own = command(folder, *CLASSIFIER, noise, "--trainer.devices=1", "--trainer.strategy=fsdp2")[3:]
    done = subprocess.run(
        [sys.executable, str(script), *own], capture_output=True, text=True, env=ONE_THREAD, timeout=300
    )
    assert done.returncode == 2, done.stderr
    assert "a checkpoint could not be written" in done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert ("--resume goes on" in done.stderr) == room_for_one
    assert folder.exists() == room_for_one  # where it holds no checkpoint, it would block the next try
    assert not room_for_one or last(folder)["global_step"] == 2
