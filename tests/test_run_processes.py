"""Runs in processes: killed, interrupted, or two that divide the work."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from forked import free_port, run_forked
from small_runs import ONE_THREAD, assert_equal, command, run_command, tiny, weights

from pws.training import train


def test_kill_and_resume(tmp_path: Path) -> None:
    # Loader workers draw batches ahead: the resumed run must not take them from another epoch's order. Each run has a process
    # of its own: what earlier tests left in this one can round sums otherwise, and eighty steps make much of it.
    flags = ("--trainer.epochs=20", "--data.augment=true", "--optim.schedule=cosine", "--data.workers=1")
    run_command(tmp_path / "whole", *flags)
    process = subprocess.Popen(command(tmp_path / "killed", *flags), stdout=subprocess.PIPE, text=True, env=ONE_THREAD)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 3/"):
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "summary.json").exists()
    resumed = run_command(tmp_path / "killed", *flags, "--resume").stdout
    assert "resuming" in resumed
    assert "epoch 1/" not in resumed
    last = torch.load(tmp_path / "killed" / "checkpoints" / "last.ckpt", weights_only=True)
    assert (last["epoch"], last["global_step"]) == (19, 80)
    assert_equal(weights(tmp_path / "killed"), weights(tmp_path / "whole"), 0.0)
    metrics = [list(csv.DictReader((tmp_path / name / "metrics.csv").open())) for name in ("killed", "whole")]
    assert metrics[0] == metrics[1]


# Not both calibrated and augmented: a zero-mean kernel answers the even corners of augmented images with rounding, of which
# ReLU lets one half through, and calibration rounds differently on two processes.
@pytest.mark.parametrize(
    ("setting", "launcher"),
    [
        (("--model.method=none", "--data.augment=true"), "lightning"),
        (("--model.method=pws", "--data.augment=true"), "torchrun"),
        (("--model.method=pws", "--model.calibrate=all"), "torchrun"),
    ],
)
def test_two_processes_train_as_one(tmp_path: Path, setting: tuple[str, ...], launcher: str) -> None:
    # float64, so that the order of sums does not hide a difference in what is summed.
    flags = ("--trainer.epochs=2", "--trainer.precision=64-true", *setting)
    one = train(tiny(*flags), tmp_path / "one", quiet=True)
    if launcher == "lightning":
        run_command(tmp_path / "two", *flags, "--trainer.devices=2")
    else:
        run_forked(2, free_port(), tmp_path / "two", command(tmp_path / "two", *flags, "--trainer.devices=2")[3:])
    assert_equal(weights(tmp_path / "two"), weights(tmp_path / "one"), 1e-9)
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert (two["steps"], two["metrics"]["accuracy"]) == (one.steps, one.metrics["accuracy"])
    assert two["metrics"]["loss"] == pytest.approx(one.metrics["loss"], rel=1e-6)
    assert two["train_loss"] == pytest.approx(one.train_loss, rel=1e-6)


def test_accumulated_parts_train_as_one_batch(tmp_path: Path) -> None:
    flags = ("--trainer.epochs=2", "--trainer.precision=64-true")
    train(tiny(*flags), tmp_path / "whole", quiet=True)
    summary = train(tiny(*flags, "--trainer.accumulate=4"), tmp_path / "parts", quiet=True)
    assert summary.steps == 8
    assert_equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"), 1e-9)


def test_interrupt_exits_with_130(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(tmp_path / "run", "--trainer.epochs=500"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ONE_THREAD,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "pws: interrupted" in error
    assert "Traceback" not in error


def test_two_processes_end_together_when_one_overflows(tmp_path: Path) -> None:
    flags = ("--model.method=none", "--optim.lr=1e6", "--optim.step_bound=null", "--trainer.devices=2")
    run = run_command(tmp_path / "run", *flags, code=3)
    assert run.stderr.count("non-finite at step") == 1
