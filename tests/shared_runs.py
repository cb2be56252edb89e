"""Runs that several processes share, and what they end with."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from small_runs import ONE_THREAD, assert_equal

from pws.training import Recipe, load_recipe
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


def noise(folder: Path) -> str:
    """The flag of images without even patches, where a kernel of mean zero answers with the rounding of its sum."""
    path = folder / "noise.npz"
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


def assert_same_end(found: Path, wanted: Path, *, stateless: bool = False) -> None:
    """The same weights, and the same state of the optimizer, if it has one."""
    ends = [last(folder) for folder in (found, wanted)]
    assert ends[0]["global_step"] == ends[1]["global_step"]
    assert_equal(*(end["state_dict"] for end in ends), 1e-9)
    states = [list(_tensors(end["optimizer_states"][0]["state"])) for end in ends]
    assert len(states[0]) == len(states[1])
    assert stateless == (not states[0])
    for mine, other in zip(*states, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


def _tensors(state: dict[int, dict[str, Any]]) -> Iterator[torch.Tensor]:
    for number in sorted(state):
        yield from (state[number][key] for key in sorted(state[number]) if isinstance(state[number][key], torch.Tensor))


def child_of(pid: int) -> int:
    """The second process of a run, which the first one started."""
    for entry in Path("/proc").iterdir():
        try:
            child = entry.name.isdigit() and f"PPid:\t{pid}\n" in (entry / "status").read_text()
            if child and b"LOCAL_RANK=1" in (entry / "environ").read_bytes():
                return int(entry.name)
        except OSError:
            continue
    raise AssertionError("the run has no second process")
