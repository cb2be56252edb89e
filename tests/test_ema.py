"""The average of the weights: what is validated, tested and stored; the weights themselves go on."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

import pws.training.run as run_module
from pws.training import Recipe, evaluate, load_recipe, train

TINY = (
    *("--data.name=digits", "--data.image_size=12", "--data.train_images=128", "--data.batch_size=32"),
    *("--model.width=0.08", "--trainer.accelerator=cpu", "--trainer.devices=1", "--optim.ema=0.7"),
)


def recipe(method: str, *flags: str) -> Recipe:
    return load_recipe("fashion-mnist-allconv-pws", *TINY, f"--model.method={method}", *flags)


def stored(folder: Path, name: str = "last") -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return content


class Weights(Callback):
    """Notes the network's parameters after every step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: object) -> None:
        self.seen.append({name: p.detach().double().clone() for name, p in module.named_parameters()})


@pytest.mark.parametrize("method", ["pws", "bn"])
def test_the_average_by_its_formula(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = Weights()
    trainer = run_module.Trainer
    monkeypatch.setattr(run_module, "Trainer", lambda callbacks, **rest: trainer(callbacks=[notes, *callbacks], **rest))
    train(recipe(method, "--trainer.epochs=3"), tmp_path / "run", quiet=True)
    average = notes.seen[0]
    for weights in notes.seen[1:]:
        average = {name: 0.7 * average[name] + 0.3 * weights[name] for name in average}
    content = stored(tmp_path / "run")
    for name, value in average.items():
        torch.testing.assert_close(content["state_dict"][name].double(), value, rtol=1e-5, atol=1e-6)
        assert torch.equal(content["current_model_state"][name].double(), notes.seen[-1][name])


@pytest.mark.parametrize("method", ["pws", "bn"])
def test_validation_test_and_evaluation_see_the_average(method: str, tmp_path: Path) -> None:
    summary = train(recipe(method, "--trainer.epochs=4"), tmp_path / "run", quiet=True)
    found = evaluate(tmp_path / "run")
    assert summary.metrics["loss"] == pytest.approx(found.loss, rel=1e-5)  # type: ignore[union-attr]
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert summary.best == pytest.approx(max(float(row["val_accuracy"]) for row in rows if row["val_accuracy"]))
    plain = train(recipe(method, "--trainer.epochs=4", "--optim.ema=null"), tmp_path / "plain", quiet=True)
    weights, without = stored(tmp_path / "run")["current_model_state"], stored(tmp_path / "plain")["state_dict"]
    for name, value in without.items():
        assert torch.equal(value, weights[name]), f"{name}: the average must leave training alone"
    assert plain.metrics["loss"] != summary.metrics["loss"]


def test_a_resumed_run_goes_on_with_weights_and_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--trainer.epochs=4", "--model.dropout=0.2")
    train(recipe("pws", *flags), tmp_path / "whole", quiet=True)
    original = run_module.TaskModule.on_train_batch_start

    def killed(self: Any, batch: Any, index: int) -> None:
        if self.trainer.current_epoch == 2 and index == 1:
            raise RuntimeError("killed")
        original(self, batch, index)

    with monkeypatch.context() as patched:
        patched.setattr(run_module.TaskModule, "on_train_batch_start", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train(recipe("pws", *flags), tmp_path / "cut", quiet=True)
    resumed = train(recipe("pws", *flags), tmp_path / "cut", quiet=True, resume=True)
    whole = stored(tmp_path / "whole")
    for part in ("state_dict", "current_model_state"):
        for name, value in whole[part].items():
            assert torch.equal(stored(tmp_path / "cut")[part][name], value), name
    assert resumed.metrics["loss"] == pytest.approx(evaluate(tmp_path / "whole").loss, rel=1e-6)  # type: ignore[union-attr]
