"""`pws.training.fit`: a module and datasets given in Python train as a plain loop trains them, in a run's folder."""

from __future__ import annotations

import copy
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import pws
import pws.training.run as run_module
from pws.cli import main
from pws.training import DataConfig, OptimConfig, Recipe, TrainerConfig, fit, load_recipe, weights

CLASSES = 3


class Signals(Dataset[Any]):
    """Sequences of 12 numbers with two channels; noise is added if wanted."""

    def __init__(self, count: int, seed: int, noise: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(count) % CLASSES
        self.inputs = torch.randn(count, 2, 12, generator=generator) + self.labels[:, None, None]
        self.noise = noise

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return self.inputs[number] + self.noise * torch.randn(2, 12), int(self.labels[number])


def network(*, standardized: bool = False) -> nn.Module:
    torch.manual_seed(1)
    conv = pws.Conv1d(2, 6, 3) if standardized else nn.Conv1d(2, 6, 3)
    return nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(12, CLASSES))


def recipe(epochs: int = 2, **settings: Any) -> Recipe:
    return Recipe(
        name="mine",
        seed=4,
        optim=OptimConfig(lr=0.05, schedule="constant", weight_decay=0, **settings),
        data=DataConfig(batch_size=10),
        trainer=TrainerConfig(epochs=epochs, accelerator="cpu", devices=1, precision="64-true"),
    )


def test_it_trains_as_a_plain_loop_does(tmp_path: Path) -> None:
    train, validation, test = Signals(44, 0), Signals(12, 1), Signals(18, 2)
    model = network()
    reference = copy.deepcopy(model).double()
    summary = fit(model, train, test, recipe(), tmp_path / "run", validation_data=validation, quiet=True)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9)
    states, scores = [], []
    for epoch in range(2):
        order = torch.randperm(44, generator=torch.Generator().manual_seed(4 * 1_000_003 + epoch))
        for batch in order[:40].split(10):
            optimizer.zero_grad()
            F.cross_entropy(reference(train.inputs[batch].double()), train.labels[batch]).backward()
            optimizer.step()
        states.append(copy.deepcopy(reference.state_dict()))
        scores.append(float((reference(validation.inputs.double()).argmax(1) == validation.labels).float().mean()))
    best = 0 if scores[0] >= scores[1] else 1
    assert summary.best == pytest.approx(scores[best])
    for key, value in states[1].items():
        torch.testing.assert_close(weights(tmp_path / "run", "last")[key], value, rtol=1e-9, atol=1e-9)
    for key, value in states[best].items():
        torch.testing.assert_close(model.state_dict()[key].double(), value, rtol=1e-9, atol=1e-9)
    reference.load_state_dict(states[best])
    right = (reference(test.inputs.double()).argmax(1) == test.labels).float().mean()
    assert summary.metrics["accuracy"] == pytest.approx(float(right))


def test_a_resumed_run_draws_what_an_uninterrupted_one_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The datasets' own random numbers too; and the held-out part is the same."""
    data = Signals(50, 0, noise=0.5), Signals(18, 2)
    fit(network(standardized=True), *data, recipe(3), tmp_path / "whole", quiet=True)
    original = run_module.TaskModule.on_train_batch_start

    def killed(self: Any, batch: Any, index: int) -> None:
        if self.trainer.current_epoch == 2:
            raise RuntimeError("killed")
        original(self, batch, index)

    with monkeypatch.context() as patched:
        patched.setattr(run_module.TaskModule, "on_train_batch_start", killed)
        with pytest.raises(RuntimeError, match="killed"):
            fit(network(standardized=True), *data, recipe(3), tmp_path / "cut", quiet=True)
    torch.manual_seed(99)
    fit(network(standardized=True), *data, recipe(3), tmp_path / "cut", quiet=True, resume=True)
    for key, value in weights(tmp_path / "whole", "last").items():
        assert torch.equal(weights(tmp_path / "cut", "last")[key], value), key
    rows = [list(csv.DictReader((tmp_path / run / "metrics.csv").open())) for run in ("whole", "cut")]
    assert rows[0] == rows[1]
    assert load_recipe(tmp_path / "whole").model.method == "pws"  # which bounds the step


class Sequence(Dataset[Any]):
    """Samples of any kind."""

    def __init__(self, *samples: Any) -> None:
        self.samples = samples * 20

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> Any:
        return self.samples[number]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


INPUT = torch.zeros(2, 12)
WRONG: dict[str, tuple[Any, str]] = {
    "no pair": (Sequence({"input": INPUT, "label": 0}), "must be a pair of a tensor and a label; sample 0"),
    "no tensor": (Sequence((INPUT.numpy(), 0)), "must be a pair of a tensor and a label"),
    "no number": (Sequence((INPUT, "cat")), "label must be a class number; .*'cat'"),
    "label too large": (Sequence((INPUT, 0), (INPUT, 3)), "labels must be 0 to 2, .* got 0 to 3"),
    "unequal shapes": (Sequence((INPUT, 0), (INPUT[:, :9], 1)), r"one shape; got .*\(2, 9\), \(2, 12\)"),
    "no numbers": (Stream(), "train_data must give samples by number"),
    "empty": (TensorDataset(torch.zeros(0, 2, 12), torch.zeros(0)), "train_data must .*a length of 1 or more"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_data_are_named_and_nothing_is_left(kind: str, tmp_path: Path) -> None:
    data, words = WRONG[kind]
    with pytest.raises(pws.PwsError, match=words):
        fit(network(), data, Signals(18, 2), recipe(), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


class Named(Signals):
    classes = ("cat", "dog")


def test_a_model_that_does_not_fit_the_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(pws.PwsError, match=r"\(N, 2\) for the data's 2 classes; the model returned \(1, 3\)"):
        fit(network(), Named(30, 0), Signals(18, 2), recipe(), tmp_path / "run", quiet=True)
    with pytest.raises(pws.PwsError, match="fit trains classifiers"):
        fit(network(), Signals(30, 0), Signals(18, 2), Recipe(task="detect"), tmp_path / "run")


@pytest.mark.parametrize("command", ["evaluate", "diagnose", "export", "train"])
def test_commands_that_need_the_model_say_where_its_weights_are(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    fit(network(), Signals(30, 0), Signals(18, 2), recipe(1), run, quiet=True)
    arguments = {"export": ["--format=onnx"], "train": ["--resume"]}.get(command, [])
    assert main([command, str(run), *arguments]) == 2
    assert "load_state_dict(pws.training.weights(RUN))" in capsys.readouterr().err
    with pytest.raises(pws.PwsError, match="trained a Sequential that"):
        pws.load(run)
    network().load_state_dict(weights(run))
