"""Runs: what they leave behind, how they resume, end, and divide the work."""

from __future__ import annotations

import copy
import csv
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer, seed_everything
from timm.optim import Lamb, Muon
from torch import Tensor, nn

import pws
from pws._errors import PwsError
from pws._mark import adopt
from pws.training import Recipe, evaluate, load_recipe, train
from pws.training.callbacks import ClipGrad
from pws.training.classifier import Classifier
from pws.training.data import ImageData
from pws.training.module import NonFiniteLossError
from pws.training.monitor import MonitorCallback
from pws.training.network import method_for, model_for

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


def test_a_run_leaves_everything(tmp_path: Path) -> None:
    recipe = tiny("--trainer.epochs=3")
    summary = train(recipe, tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert stored["metrics"] == summary.metrics
    assert stored["checkpoint"] == "best"
    assert (stored["status"], stored["steps"], stored["epochs"]) == ("finished", 12, 3)
    assert stored["first_non_finite_step"] is None
    assert stored["train_seconds"] > 0
    assert stored["images_per_second"] == pytest.approx(12 * 32 / stored["train_seconds"], rel=0.01)
    assert stored["peak_memory_mb"] > 100
    assert stored["versions"]["torch"] == torch.__version__.split("+")[0]
    resolved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert (resolved["model"]["width"], resolved["optim"]["momentum"]) == (0.08, 0.9)
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    validated = [float(r["val_accuracy"]) for r in rows if r["val_accuracy"]]
    assert len(validated) == 3
    assert max(validated) == pytest.approx(summary.best)
    tested = [float(r["test_accuracy"]) for r in rows if r["test_accuracy"]]
    assert tested == [pytest.approx(summary.metrics["accuracy"])]  # at the end alone
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").is_file()


def test_the_resolved_recipe_repeats_the_run(tmp_path: Path) -> None:
    train(tiny("--trainer.epochs=1", "--optim.lr=0.05"), tmp_path / "first", quiet=True)
    train(load_recipe(tmp_path / "first" / "recipe.yaml"), tmp_path / "second", quiet=True)
    assert_equal(weights(tmp_path / "second"), weights(tmp_path / "first"), 0.0)


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


@pytest.mark.parametrize(
    ("changed", "message"),
    [("--optim.lr=0.3", "optim differs"), ("--seed=5", "seed differs"), ("--trainer.epochs=2", "trainer differs")],
)
def test_resume_with_another_recipe(tmp_path: Path, changed: str, message: str) -> None:
    train(tiny("--trainer.epochs=1"), tmp_path / "run", quiet=True)
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(PwsError, match=message):
        train(tiny("--trainer.epochs=1", changed), tmp_path / "run", resume=True, quiet=True)


# Not both calibrated and augmented: a zero-mean kernel answers the even corners of augmented images with rounding, of which
# ReLU lets one half through, and calibration rounds differently on two processes.
@pytest.mark.parametrize(
    "setting",
    [
        ("--model.method=none", "--data.augment=true"),
        ("--model.method=pws", "--data.augment=true"),
        ("--model.method=pws", "--model.calibrate=all"),
    ],
)
def test_two_processes_train_as_one(tmp_path: Path, setting: tuple[str, ...]) -> None:
    # float64, so that the order of sums does not hide a difference in what is summed.
    flags = ("--trainer.epochs=2", "--trainer.precision=64-true", *setting)
    one = train(tiny(*flags), tmp_path / "one", quiet=True)
    run_command(tmp_path / "two", *flags, "--trainer.devices=2")
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


def test_calibration_runs_once_and_not_on_resume(tmp_path: Path) -> None:
    flags = ("--trainer.epochs=1", "--optim.lr=0")
    train(tiny(*flags), tmp_path / "plain", quiet=True)
    recipe = tiny(*flags, "--model.calibrate=all")
    train(recipe, tmp_path / "run", quiet=True)
    calibrated, plain = weights(tmp_path / "run"), weights(tmp_path / "plain")
    kernels = [key for key, value in plain.items() if value.dim() > 1]
    assert kernels
    for key in kernels:
        ratio = calibrated[key] / plain[key]
        assert ratio.std() < 1e-3 * ratio.mean()  # one factor a layer
        assert abs(ratio.mean() - 1) > 1e-3
    (tmp_path / "run" / "summary.json").unlink()
    train(recipe, tmp_path / "run", resume=True, quiet=True)
    assert_equal(weights(tmp_path / "run"), calibrated, 0.0)


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    train(tiny("--trainer.epochs=1"), tmp_path / "run", quiet=True)
    before = (tmp_path / "run" / "summary.json").read_bytes()
    with pytest.raises(PwsError, match="is finished"):
        train(tiny("--trainer.epochs=1"), tmp_path / "run", resume=True, quiet=True)
    assert (tmp_path / "run" / "summary.json").read_bytes() == before


def test_the_last_checkpoint_is_the_last_epoch(tmp_path: Path) -> None:
    # At learning rate 0 no epoch is better than the first: the best one stays, the last one goes on.
    train(tiny("--optim.lr=0", "--trainer.epochs=3"), tmp_path / "run", quiet=True)
    epochs = [
        torch.load(tmp_path / "run" / "checkpoints" / f"{name}.ckpt", weights_only=True)["epoch"]
        for name in ("best", "last")
    ]
    assert epochs == [0, 2]


def test_overflow_in_the_last_step_is_not_a_finished_run(tmp_path: Path) -> None:
    flags = ("--model.method=none", "--optim.lr=1e9", "--optim.step_bound=null", "--trainer.max_steps=1")
    with pytest.raises(NonFiniteLossError) as caught:
        train(tiny(*flags), tmp_path / "run", quiet=True)
    assert caught.value.step == 1
    assert caught.value.layer is not None
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "non-finite"


def test_max_steps_ends_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    summary = train(
        tiny("--trainer.epochs=2", "--trainer.max_steps=6", "--trainer.early_stop=3"), tmp_path / "run", quiet=True
    )
    assert summary.steps == 6
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 6
    assert evaluate(tmp_path / "run", "last").accuracy == pytest.approx(summary.metrics["accuracy"])


def test_non_finite_loss_names_step_and_layer(tmp_path: Path) -> None:
    recipe = tiny("--model.method=none", "--optim.lr=1e6", "--optim.step_bound=null")
    with pytest.raises(NonFiniteLossError) as caught:
        train(recipe, tmp_path / "run", quiet=True)
    assert caught.value.layer is not None
    assert caught.value.layer.startswith("features.")
    stored = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert stored["status"] == "non-finite"
    assert stored["first_non_finite_step"] == caught.value.step
    assert 1 <= caught.value.step <= 4
    assert stored["metrics"] == {}


def test_early_stop(tmp_path: Path) -> None:
    summary = train(tiny("--optim.lr=0", "--trainer.epochs=9", "--trainer.early_stop=2"), tmp_path / "run", quiet=True)
    assert summary.epochs == 3


def test_learning_rate_and_clipping_reach_the_optimizer(tmp_path: Path) -> None:
    flags = ("--model.method=none", "--optim.clip_norm=0.5", "--optim.weight_decay=0", "--trainer.max_steps=1")
    start = train(tiny(*flags, "--optim.lr=0"), tmp_path / "a", quiet=True)
    train(tiny(*flags, "--optim.lr=0.1"), tmp_path / "b", quiet=True)
    assert start.steps == 1
    assert "accuracy" in start.metrics
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    squares = sum(float((first[key] - second[key]).double().square().sum()) for key in first)
    assert math.sqrt(squares) == pytest.approx(0.1 * 0.5, rel=1e-3)


def test_mixed_precision(tmp_path: Path) -> None:
    summary = train(tiny("--trainer.precision=bf16-mixed", "--trainer.epochs=1"), tmp_path / "run", quiet=True)
    assert summary.status == "finished"
    assert all(value.dtype == torch.float32 for key, value in weights(tmp_path / "run").items() if "model" in key)


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
    assert max(lengths(first_step())) == pytest.approx(0.03, rel=1e-3)
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
