"""Runs that take a second, in this process or in one of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from pws.training import Recipe, load_recipe

TINY = (
    *("--data.name=digits", "--data.image_size=12", "--data.train_images=128", "--data.batch_size=32"),
    *("--model.width=0.08", "--trainer.accelerator=cpu", "--trainer.devices=1"),
)

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def tiny(*flags: str) -> Recipe:
    return load_recipe("fashion-mnist-allconv-pws", *TINY, *flags)


def weights(folder: Path) -> dict[str, Tensor]:
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    state: dict[str, Tensor] = checkpoint["state_dict"]
    return state


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(
            found[key], value, rtol=tolerance, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
        )


def arguments(folder: Path, *flags: str) -> list[str]:
    return [
        *("train", "fashion-mnist-allconv-pws", *TINY, *flags),
        *(f"--runs={folder.parent}", f"--name={folder.name}"),
    ]


def command(folder: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "pws", *arguments(folder, *flags)]


def run_command(folder: Path, *flags: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    # The timeout is for a hang, as when one of two processes waits for the other for ever.
    run = subprocess.run(command(folder, *flags), capture_output=True, text=True, env=ONE_THREAD, timeout=300)
    assert run.returncode == code, run.stderr
    return run
