"""What a run's optimizer does: every kind with every kind of method, rates, bounds."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from small_runs import assert_equal, tiny, weights
from timm.optim import Lamb, Muon
from torch import Tensor, nn

import pws
from pws._mark import adopt
from pws.training import train
from pws.training.callbacks import ClipGrad
from pws.training.classifier import Classifier
from pws.training.data import ImageData
from pws.training.module import NonFiniteLossError
from pws.training.monitor import MonitorCallback
from pws.training.network import method_for, model_for


def test_learning_rate_and_clipping_reach_the_optimizer(tmp_path: Path) -> None:
    flags = ("--model.method=none", "--optim.clip_norm=0.5", "--optim.weight_decay=0", "--trainer.max_steps=1")
    start = train(tiny(*flags, "--optim.lr=0"), tmp_path / "a", quiet=True)
    train(tiny(*flags, "--optim.lr=0.1"), tmp_path / "b", quiet=True)
    assert start.steps == 1
    assert "accuracy" in start.metrics
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    squares = sum(float((first[key] - second[key]).double().square().sum()) for key in first)
    assert math.sqrt(squares) == pytest.approx(0.1 * 0.5, rel=1e-3)


def one_step(*flags: str, callback: Callback | None = None) -> tuple[Trainer, Classifier, nn.Module]:
    """The trainer and its module after one step without decay at a constant rate, and the network before."""
    still = ("--optim.weight_decay=0", "--optim.schedule=constant")
    recipe = tiny("--trainer.max_steps=1", *still, *flags)
    data = ImageData(recipe.data, recipe.seed)
    seed_everything(0, verbose=False)
    model = model_for(recipe.model, data.splits)
    before = copy.deepcopy(model)
    module = Classifier(model, recipe.optim, 10, method=method_for(recipe.model))
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet["callbacks"] = callback
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, limit_val_batches=0, use_distributed_sampler=False, **quiet
    )
    trainer.fit(module, datamodule=data)
    return trainer, module, before


def first_step(*flags: str) -> dict[str, Tensor]:
    """What one step without momentum adds to each parameter at learning rate 1, and to the latents of a standardized one."""
    trainer, module, before = one_step("--optim.momentum=0", "--optim.lr=1", *flags)
    step = {}
    for key, old in before.named_parameters():
        new, name = module.model.get_parameter(key), key.rpartition(".")[0]
        mark = pws.marked(before).get(name)
        if mark is None or not key.endswith("weight"):
            step[key] = (new - old).detach()
            continue
        w, alpha = adopt(old, mark)
        state = trainer.optimizers[0].state[new]
        step[f"{name}.w"], step[f"{name}.alpha"] = state["w"] - w, state["alpha"] - alpha
    return step


def lengths(step: dict[str, Tensor]) -> list[float]:
    """How far each layer moved."""
    squares: dict[str, float] = {}
    for key, change in step.items():
        layer = key.rpartition(".")[0]
        squares[layer] = squares.get(layer, 0.0) + float(change.square().sum())
    return [square**0.5 for square in squares.values()]


def test_a_methods_gradient_rule_acts_in_training() -> None:
    plain, centred = first_step("--model.method=none"), first_step("--model.method=gc")
    means = {key: change.flatten(1).mean(1).abs().max() for key, change in centred.items() if change.dim() > 1}
    assert max(means.values()) < 1e-6
    assert plain["features.0.weight"].flatten(1).mean(1).abs().max() > 1e-4


def test_the_steps_are_bounded_as_the_recipe_says() -> None:
    assert max(lengths(first_step("--optim.step_bound=null"))) > 0.1
    for momentum in (0.0, 0.5, 0.9):
        found = max(lengths(first_step(f"--optim.momentum={momentum}", "--optim.lr=10")))
        assert found == pytest.approx(0.3 * (1 - momentum), rel=1e-3)
    assert max(lengths(first_step("--optim.step_bound=0.01"))) == pytest.approx(0.01, rel=1e-3)
    bounded = first_step("--model.method=none", "--optim.step_bound=0.01")
    assert max(lengths(bounded)) == pytest.approx(0.01, rel=1e-3)
    assert max(lengths(first_step("--model.method=none"))) > 0.03


NAMES = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop, "lamb": Lamb, "muon": Muon}

STANDARDIZING = {
    "sgd": pws.optim.SGD,
    "adamw": pws.optim.AdamW,
    "rmsprop": pws.optim.Wrapped,
    "lamb": pws.optim.Wrapped,
    "muon": pws.optim.Wrapped,
}


@pytest.mark.parametrize("method", ["pws", "pws-paper", "bn", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_trains_every_kind_of_method(name: str, method: str) -> None:
    trainer, module, before = one_step(f"--model.method={method}", f"--optim.name={name}", "--optim.lr=0.01")
    kinds = STANDARDIZING if method.startswith("pws") else NAMES
    assert type(trainer.optimizers[0]) is kinds[name]
    for key, old in before.named_parameters():
        new = module.model.get_parameter(key)
        assert new.isfinite().all(), key
        assert not torch.equal(new, old), key


@pytest.mark.parametrize("name", NAMES)
def test_the_bound_of_marked_layers_is_inside_the_optimizer(name: str) -> None:
    flags = (f"--optim.name={name}", "--optim.step_bound=0.01")
    assert max(lengths(first_step(*flags))) == pytest.approx(0.01, rel=1e-2)
    callbacks = [one_step(*flags, f"--model.method={method}")[0].callbacks for method in ("pws", "none")]
    assert [sum(isinstance(callback, ClipGrad) for callback in each) for each in callbacks] == [0, 1]


@pytest.mark.parametrize("name", NAMES)
def test_a_marked_network_that_was_trained_has_kernels_of_mean_zero(name: str, tmp_path: Path) -> None:
    train(tiny("--trainer.epochs=2", f"--optim.name={name}"), tmp_path / "run", quiet=True)
    kernels = {key: value for key, value in weights(tmp_path / "run").items() if value.dim() > 1}
    assert len(kernels) == 10
    for key, kernel in kernels.items():
        filters = kernel.flatten(1)
        assert (filters.mean(1).abs() < 1e-6 * filters.abs().amax(1)).all(), key


def test_a_gradient_that_is_not_finite_ends_the_run_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(module: Classifier, optimizer: torch.optim.Optimizer) -> None:
        module.model.head.weight.grad[0, 0] = math.nan

    seen: list[nn.Module] = []
    monkeypatch.setattr(Classifier, "on_before_optimizer_step", spoil)
    monkeypatch.setattr(Classifier, "on_fit_start", lambda module: seen.append(module.model))
    with pytest.raises(
        NonFiniteLossError, match="a gradient went non-finite at step 0: every layer's output was finite"
    ):
        one_step()
    recipe = tiny()
    seed_everything(0, verbose=False)
    fresh = model_for(recipe.model, ImageData(recipe.data, recipe.seed).splits)
    assert_equal(seen[0].state_dict(), fresh.state_dict(), 0.0)


@pytest.mark.parametrize(("name", "judged"), [("sgd", (0.01, 0.9)), ("adamw", (None, 0.0))])
@pytest.mark.parametrize("method", ["pws", "bn"])
def test_the_monitor_knows_the_optimizer_and_judges_by_sgds_rate(
    method: str, name: str, judged: tuple[float | None, float]
) -> None:
    watch = MonitorCallback()
    trainer, _, _ = one_step(f"--model.method={method}", f"--optim.name={name}", "--optim.lr=0.01", callback=watch)
    assert watch.monitor.optimizer is trainer.optimizers[0]
    assert (watch.monitor.lr, watch.monitor.momentum) == judged
