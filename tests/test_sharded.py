"""Sharded runs (FSDP2): equal to one process, killed and resumed on another number of processes, damaged."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from small_runs import ONE_THREAD, assert_equal

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
    *("--model.options={}", "--trainer.epochs=1", "--trainer.max_steps=3", "--data.workers=0"),
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


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("task", ["classify", "detect"])
def test_several_processes_train_as_one(tmp_path: Path, noise: str, task: str, devices: int, strategy: str) -> None:
    settings = (*CLASSIFIER, noise) if task == "classify" else DETECTOR
    train(one_process(*settings), tmp_path / "one", quiet=True)
    run(tmp_path / "several", *settings, f"--trainer.devices={devices}", f"--trainer.strategy={strategy}")
    assert_same_end(tmp_path / "several", tmp_path / "one")
