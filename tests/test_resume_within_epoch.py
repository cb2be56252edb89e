"""A run that is stopped within an epoch goes on from there, to the same bits."""

from __future__ import annotations

import csv
import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from pws._errors import PwsError
from pws.training import Recipe, load_recipe, train
from pws.training.checkpoints import checksum_of
from pws.training.classifier import Classifier
from pws.training.samplers import TrainSampler

RECIPE = (
    *(
        "--data.name=digits",
        "--data.image_size=12",
        "--data.train_images=256",
        "--data.batch_size=32",
        "--data.augment=true",
        "--trainer.epochs=3",
    ),
    *("--model.width=0.08", "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.checkpoint_steps=3"),
)
STEPS = 24


class StoppedError(Exception):
    """What stands for a kill: the process ends, and only what is on the disk stays."""


def recipe(*flags: str) -> Recipe:
    return load_recipe("fashion-mnist-allconv-pws", *RECIPE, *flags)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, seen: list[Any]) -> None:
    """Note the batches of each step; end in the middle of `step`, the first time."""
    original = Classifier.losses

    def losses(self: Classifier, batch: Any) -> Any:
        if self.trainer.global_step == step and step not in stopped:
            stopped.append(step)
            raise StoppedError
        seen.append((self.trainer.global_step, batch[1].tolist(), float(batch[0].double().sum())))
        return original(self, batch)

    stopped: list[int] = []
    monkeypatch.setattr(Classifier, "losses", losses)


def stopped_and_resumed(
    monkeypatch: pytest.MonkeyPatch, folder: Path, step: int, *flags: str
) -> tuple[Path, list[Any]]:
    seen: list[Any] = []
    with monkeypatch.context() as patch:
        stop_at(patch, step, seen)
        with pytest.raises(StoppedError):
            train(recipe(*flags), folder, quiet=True)
        train(recipe(*flags), folder, resume=True, quiet=True)
    return folder, seen


def everything(folder: Path) -> tuple[dict[str, Any], list[dict[str, str]], dict[str, Any]]:
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    summary = json.loads((folder / "summary.json").read_text())
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    return checkpoint, rows, {key: summary[key] for key in ("best", "metrics", "train_loss", "epochs", "steps")}


@pytest.mark.parametrize("flags", [(), ("--trainer.accumulate=2", "--optim.ema=0.9"), ("--data.workers=1",)])
def test_the_same_bits_wherever_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    train(recipe(*flags), tmp_path / "whole", quiet=True)
    whole, rows, summary = everything(tmp_path / "whole")
    for step in (4, 9, 16):  # epochs have 8 steps: behind a checkpoint, behind it again, at the start of an epoch
        folder, _ = stopped_and_resumed(monkeypatch, tmp_path / f"stopped{step}", step, *flags)
        found, found_rows, found_summary = everything(folder)
        for key, value in whole["state_dict"].items():
            assert torch.equal(found["state_dict"][key], value), (step, key)
        states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (found, whole)]
        assert checksum_of(states[0]) == checksum_of(states[1]), step
        assert found_rows == rows, step
        assert found_summary == summary, step


def test_no_batch_is_lost_or_trained_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole: list[Any] = []
    with monkeypatch.context() as patch:
        stop_at(patch, -1, whole)
        train(recipe(), tmp_path / "whole", quiet=True)
    _, seen = stopped_and_resumed(monkeypatch, tmp_path / "stopped", 14)
    assert [step for step, *_ in seen] == [
        *range(14),
        *range(12, STEPS),
    ]
    assert sorted({step: batch for step, *batch in seen}.items()) == sorted((step, batch) for step, *batch in whole)


def test_accumulation_may_not_change_within_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 4, [])
        with pytest.raises(StoppedError):
            train(recipe("--trainer.accumulate=2"), tmp_path / "run", quiet=True)
    with pytest.raises(PwsError, match=r"divides in 2; this recipe has 4\. Resume with --trainer\.accumulate 2"):
        train(recipe("--trainer.accumulate=4"), tmp_path / "run", resume=True, quiet=True)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_another_number_of_processes_goes_on_with_the_same_images(world: int) -> None:
    """Of an epoch that one process began, `world` processes train the rest."""

    def batches(rank: int, world: int, first: int) -> list[list[int]]:
        sampler = TrainSampler(96, 8, seed=3, rank=rank, world=world, accumulate=1)
        sampler.start_at(5, first)
        return [numbers for _, numbers in sampler]

    whole = batches(0, 1, 0)
    rest = zip(*(batches(rank, world, 7) for rank in range(world)), strict=True)
    assert [sorted(chain(*parts)) for parts in rest] == [sorted(batch) for batch in whole[7:]]


def test_accumulated_gradients_are_in_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run, stopped behind the first part of its first step, goes on with the whole step."""
    flags = ("--trainer.accumulate=2",)
    train(recipe(*flags), tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patch:
        stop_at(patch, 4, [])
        with pytest.raises(StoppedError):
            train(recipe(*flags), tmp_path / "run", quiet=True)
    original, parts = Classifier.losses, iter(range(2))

    def losses(self: Classifier, batch: Any) -> Any:
        if next(parts) == 1:
            raise StoppedError
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "losses", losses)
        with pytest.raises(StoppedError):
            train(recipe(*flags), tmp_path / "run", resume=True, quiet=True)
    train(recipe(*flags), tmp_path / "run", resume=True, quiet=True)
    found, whole = (everything(tmp_path / name)[0]["state_dict"] for name in ("run", "whole"))
    assert all(torch.equal(found[key], value) for key, value in whole.items())
