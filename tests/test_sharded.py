"""Sharded runs (FSDP2): equal to one process, killed and resumed on another number of processes, damaged."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from small_runs import ONE_THREAD, assert_equal

import pws
from pws._errors import PwsError
from pws.training import Recipe, load_recipe, train
from pws.training.checkpoints import LAST, load_checkpoint

CLASSIFIER: Final = (
    *("fashion-mnist-allconv-pws", "--data.name=npz", "--data.batch_size=32", "--data.augment=false"),
    *("--model.width=0.08", "--trainer.epochs=3"),
)
# RetinaNet draws no random samples, and the mean of its losses over two halves of a batch is that over the batch.
DETECTOR: Final = (
    *("scenes-faster-rcnn", "--model.name=retinanet-resnet18", "--data.name=digit-scenes", "--data.batch_size=4"),
    *("--data.augment=false", "--data.image_size=64", "--data.train_images=24", "--model.width=0.05"),
    *("--model.options={}", "--trainer.epochs=1", "--trainer.max_steps=3", "--data.validation=0.2"),
)
EVERYWHERE: Final = ("--trainer.accelerator=cpu", "--trainer.precision=64-true", "--trainer.checkpoint_steps=2")
SHARDED: Final = ("--trainer.devices=2", "--trainer.strategy=fsdp2")


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Images without even patches, where a kernel of mean zero answers with the rounding of its sum."""
    path = tmp_path_factory.mktemp("data") / "noise.npz"
    draw = np.random.default_rng(0)
    parts = {"train": 128, "test": 40}
    images = {f"{part}_images": draw.integers(0, 256, (n, 12, 12, 3), dtype=np.uint8) for part, n in parts.items()}
    labels = {f"{part}_labels": draw.integers(0, 5, (n, 1)) for part, n in parts.items()}
    np.savez(path, **images, **labels)  # type: ignore[arg-type]
    return f"--data.root={path}"


def one_process(*settings: str) -> Recipe:
    return load_recipe(settings[0], *settings[1:], *EVERYWHERE, "--trainer.devices=1")


def command(folder: Path, *settings: str) -> list[str]:
    named = (f"--runs={folder.parent}", f"--name={folder.name}")
    return [sys.executable, "-m", "pws", "train", *settings[:1], *settings[1:], *EVERYWHERE, *named]


def run(folder: Path, *settings: str) -> None:
    done = subprocess.run(command(folder, *settings), capture_output=True, text=True, env=ONE_THREAD, timeout=300)
    assert done.returncode == 0, done.stderr


def last(folder: Path) -> dict[str, Any]:
    return load_checkpoint(folder / "checkpoints" / LAST)


def assert_same_end(found: Path, wanted: Path) -> None:
    """The same weights, and the same state of the optimizer."""
    ends = [last(folder) for folder in (found, wanted)]
    assert ends[0]["global_step"] == ends[1]["global_step"]
    assert_equal(*(end["state_dict"] for end in ends), 1e-9)
    states = [list(_tensors(end["optimizer_states"][0]["state"])) for end in ends]
    assert len(states[0]) == len(states[1]) > 0
    for mine, other in zip(*states, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


def _tensors(state: dict[int, dict[str, Any]]) -> Iterator[torch.Tensor]:
    for number in sorted(state):
        yield from (state[number][key] for key in sorted(state[number]) if isinstance(state[number][key], torch.Tensor))


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
    os.kill(_child_of(process.pid), signal.SIGKILL)
    process.wait(timeout=100)
    assert not (folder / "summary.json").exists()
    said = (folder.parent / "log").read_text()
    assert process.returncode == 2, said
    assert "another process of the run ended" in said
    return folder


def _child_of(pid: int) -> int:
    """The second process of a run, which the first one started."""
    for entry in Path("/proc").iterdir():
        try:
            child = entry.name.isdigit() and f"PPid:\t{pid}\n" in (entry / "status").read_text()
            if child and b"LOCAL_RANK=1" in (entry / "environ").read_bytes():
                return int(entry.name)
        except OSError:
            continue
    raise AssertionError("the run has no second process")


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "devices", "strategy"),
    [("classify", 4, "ddp"), ("classify", 4, "fsdp2"), ("detect", 4, "ddp"), ("detect", 2, "fsdp2")],
)
def test_several_processes_train_as_one(tmp_path: Path, noise: str, task: str, devices: int, strategy: str) -> None:
    settings = (*CLASSIFIER, noise) if task == "classify" else DETECTOR
    train(one_process(*settings), tmp_path / "one", quiet=True)
    run(tmp_path / "several", *settings, f"--trainer.devices={devices}", f"--trainer.strategy={strategy}")
    assert_same_end(tmp_path / "several", tmp_path / "one")
    found, wanted = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("several", "one"))
    assert found["train_loss"] == pytest.approx(wanted["train_loss"], rel=1e-6)
    assert found["metrics"].keys() == wanted["metrics"].keys()
    for name, value in wanted["metrics"].items():
        assert found["metrics"][name] == (value if value is None else pytest.approx(value, rel=1e-6)), name


@pytest.mark.slow
def test_ten_kills_at_random_moments(tmp_path: Path, noise: str) -> None:
    """One of two processes dies ten times, of DDP and of FSDP2 in turn: no batch is lost or trained twice."""
    settings = (*CLASSIFIER, noise, "--trainer.epochs=30")
    train(one_process(*settings), tmp_path / "whole", quiet=True)
    draw, folder = random.Random(0), tmp_path / "killed"
    for number in range(10):
        strategy = f"--trainer.strategy={('ddp', 'fsdp2')[number % 2]}"
        resume = ["--resume"] if folder.exists() else []
        kill_one_of_two(command(folder, *settings, "--trainer.devices=2", strategy, *resume), draw.uniform(0, 1.5))
    train(one_process(*settings), folder, resume=True, quiet=True)
    assert_same_end(folder, tmp_path / "whole")
    rows = [list(csv.DictReader((run / "metrics.csv").open())) for run in (folder, tmp_path / "whole")]
    assert [row.keys() for row in rows[0]] == [row.keys() for row in rows[1]]
    for mine, other in zip(*rows, strict=True):
        assert {key: float(cell or "nan") for key, cell in mine.items()} == pytest.approx(
            {key: float(cell or "nan") for key, cell in other.items()}, rel=1e-6, nan_ok=True
        )


def kill_one_of_two(arguments: list[str], seconds: float) -> None:
    """Start a run, and kill its second process so many seconds after the training began."""
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ONE_THREAD)
    assert process.stdout is not None
    assert process.stderr is not None
    line = process.stdout.readline()
    assert " allconv with pws " in line, line + process.stderr.read()
    time.sleep(seconds)
    os.kill(_child_of(process.pid), signal.SIGKILL)
    process.communicate(timeout=100)
    assert process.returncode in (
        2,
        -signal.SIGKILL,
    )  # Lightning kills the first process where it sees the other one dead


@pytest.mark.slow
def test_two_nodes_of_torchrun(tmp_path: Path, noise: str) -> None:
    settings = (*CLASSIFIER, noise)
    train(one_process(*settings), tmp_path / "one", quiet=True)
    own = command(
        tmp_path / "nodes", *settings, "--trainer.devices=1", "--trainer.num_nodes=2", "--trainer.strategy=fsdp2"
    )
    where = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *where]
    nodes = [
        subprocess.Popen(
            [*torchrun, f"--node-rank={rank}", *own[1:]], stderr=subprocess.PIPE, text=True, env=ONE_THREAD
        )
        for rank in range(2)
    ]
    for node in nodes:
        _, said = node.communicate(timeout=300)
        assert node.returncode == 0, said
    assert_same_end(tmp_path / "nodes", tmp_path / "one")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


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


def test_a_disk_that_fills_leaves_the_checkpoint_before(tmp_path: Path, noise: str) -> None:
    script = tmp_path / "full.py"
    script.write_text(FULL_DISK)
    own = command(tmp_path / "run", *CLASSIFIER, noise, "--trainer.devices=1", "--trainer.strategy=fsdp2")[3:]
    done = subprocess.run(
        [sys.executable, str(script), *own], capture_output=True, text=True, env=ONE_THREAD, timeout=300
    )
    assert done.returncode == 2, done.stderr
    assert "a checkpoint could not be written" in done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert last(tmp_path / "run")["global_step"] == 2
