"""Private runs: what they count, keep and set."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from opacus.optimizers import DPOptimizer
from small_private import NOISY, network, tiny
from small_runs import weights
from torch import Tensor, nn

import pws
from pws.training import PrivacyConfig, Recipe, train
from pws.training.network import method_for
from pws.training.private.classifier import PrivateClassifier
from pws.training.private.engine import Accounting
from pws.training.tasks import trained_task


def test_the_summary_states_what_was_spent(tmp_path: Path) -> None:
    """Steps on all images together are one Gaussian mechanism, whose privacy has a closed form: Balle and Wang 2018."""
    summary = train(tiny(*NOISY, "--data.batch_size=128", "--trainer.max_steps=2"), tmp_path / "run", quiet=True)
    assert summary.privacy is not None
    epsilon, delta, mu = summary.privacy.epsilon, 0.001, math.sqrt(2)
    assert epsilon is not None
    normal = torch.distributions.Normal(0.0, 1.0)

    def cdf(x: float) -> float:
        return float(normal.cdf(torch.tensor(x, dtype=torch.float64)))

    def exact(epsilon: float) -> float:
        return cdf(-epsilon / mu + mu / 2) - math.exp(epsilon) * cdf(-epsilon / mu - mu / 2)

    # The accountant's epsilon is at most 0.01 too large, and never too small.
    assert exact(epsilon) <= delta <= exact(epsilon - 0.02)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["privacy"] == {
        **{"epsilon": epsilon, "delta": delta, "noise": 1.0, "clip_norm": 1.0},
        **{"sample_rate": 1.0, "steps": 2, "accountant": "prv"},
    }


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_the_noise_for_an_epsilon_spends_it(accountant: str, tmp_path: Path) -> None:
    flags = ("--privacy.epsilon=3", "--privacy.delta=0.001", f"--privacy.accountant={accountant}")
    summary = train(tiny(*flags), tmp_path / "run", quiet=True)
    assert summary.privacy is not None
    assert summary.privacy.epsilon is not None
    assert 2.9 < summary.privacy.epsilon <= 3.0


def test_a_run_that_was_not_private_states_nothing(tmp_path: Path) -> None:
    assert train(tiny(), tmp_path / "run", quiet=True).privacy is None


@pytest.mark.parametrize("steps", [None, 3])
def test_a_resumed_run_ends_with_the_same_weights_and_privacy(
    steps: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(*NOISY, *(() if steps is None else (f"--trainer.checkpoint_steps={steps}",)))
    whole = train(recipe, tmp_path / "whole", quiet=True)
    step, original = 6, PrivateClassifier.training_step

    def stopped(self: PrivateClassifier, batch: Any, number: int) -> Any:
        if self.trainer.global_step == step:
            raise KeyboardInterrupt
        return original(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(PrivateClassifier, "training_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "run", quiet=True)
    resumed = train(recipe, tmp_path / "run", resume=True, quiet=True)
    assert resumed.privacy == whole.privacy
    wanted = weights(tmp_path / "whole")
    assert all(torch.equal(value, wanted[name]) for name, value in weights(tmp_path / "run").items())


def test_batches_without_images_take_a_step_of_noise_alone(tmp_path: Path) -> None:
    summary = train(
        tiny(*NOISY, "--data.batch_size=1", "--trainer.max_steps=40", "--data.augment=true"),
        tmp_path / "run",
        quiet=True,
    )
    assert summary.steps == 40  # a batch is empty with probability 0.37
    assert summary.privacy is not None
    assert summary.privacy.steps == 40


@pytest.mark.parametrize("form", ["optimizer", "layers"])
def test_the_recipes_own_bound_holds_behind_the_noise(form: str, tmp_path: Path) -> None:
    bound = 0.001
    flags = (
        *NOISY,
        f"--model.form={form}",
        f"--optim.step_bound={bound}",
        "--trainer.max_steps=1",
        "--optim.momentum=0",
    )
    recipe = tiny(*flags, "--optim.weight_decay=0")
    train(recipe, tmp_path / "run", quiet=True)
    free = tiny(*flags[:-2], "--optim.step_bound=null", *flags[-2:], "--optim.weight_decay=0")
    train(free, tmp_path / "free", quiet=True)
    moved = {name: lengths(tmp_path / name, recipe) for name in ("run", "free")}
    assert all(short < long for short, long in zip(moved["run"], moved["free"], strict=True))
    if form == "layers":  # here the weight is what the bound is on
        assert all(length <= bound * (1 + 1e-3) for length in moved["run"])
        assert min(moved["free"]) > bound


def lengths(run: Path, recipe: Recipe) -> list[float]:
    """How far each weight moved in the run."""
    task = trained_task(recipe)
    data = task.data(recipe.data, recipe.seed)
    seed_everything(recipe.seed, verbose=False)
    start = task.network(recipe.model, data, method_for(recipe.model)).state_dict()
    found = {name.removeprefix("model."): value for name, value in weights(run).items()}
    return [float((value - start[name]).norm()) for name, value in found.items() if name.endswith("weight")]


def test_the_rate_that_is_counted_is_that_of_the_batches() -> None:
    """93 batches per epoch: the floating-point number 1 / (1 / 93) lies below 93."""
    net, accounting = network(), Accounting(PrivacyConfig(noise=1.0, delta=1e-4))
    optimizer, criterion = accounting.attach(
        net, torch.optim.SGD(net.parameters(), lr=0.1), nn.CrossEntropyLoss(), 930, 10, 5
    )
    criterion(net(torch.randn(3, 4).double()), torch.tensor([0, 1, 2])).backward()
    optimizer.step()
    assert accounting.engine.accountant.history == [(1.0, 1 / 93, 1)]
    assert (accounting.spent().sample_rate, optimizer.expected_batch_size) == (1 / 93, 10)


def test_a_private_run_takes_one_device_by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    class AskedError(Exception):
        pass

    def trainer(**settings: Any) -> None:
        asked.append(settings["devices"])
        raise AskedError

    monkeypatch.setattr(pws.training.run, "Trainer", trainer)
    for number, flags in enumerate((NOISY, ())):
        with pytest.raises(AskedError):
            train(tiny(*flags, "--trainer.devices=auto"), tmp_path / str(number), quiet=True)
    assert asked == [1, "auto"]


def test_rounded_gradients_are_clipped_in_full_precision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = set()
    clip = DPOptimizer.clip_and_accumulate

    def clipped(self: DPOptimizer) -> None:
        seen.update(gradient.dtype for gradient in self.grad_samples)
        clip(self)

    monkeypatch.setattr(DPOptimizer, "clip_and_accumulate", clipped)
    train(tiny(*NOISY, "--trainer.precision=bf16-mixed", "--trainer.max_steps=1"), tmp_path / "run", quiet=True)
    assert seen == {torch.float32}


def test_scales_are_set_on_noise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is set from private images is not accounted for."""
    seen: list[Tensor] = []
    original = pws.training.module.calibrate

    def calibrate(model: Any, batches: Any, **options: Any) -> Any:
        seen.extend(batches)
        return original(model, batches, **options)

    monkeypatch.setattr(pws.training.module, "calibrate", calibrate)
    train(tiny(*NOISY, "--model.calibrate=all", "--trainer.max_steps=1"), tmp_path / "run", quiet=True)
    (images,) = seen
    assert float(images.mean()) == pytest.approx(0, abs=0.1)
    assert float(images.std()) == pytest.approx(1, abs=0.1)
    assert len(images.unique()) > images.numel() / 2  # those of digits hold 17 values
