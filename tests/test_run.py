"""Runs: what they leave behind, how they resume, end, and divide the work."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from pws.errors import PwsError
from pws.kernels.together import Prepared
from pws.training import Recipe, evaluate, load_recipe, train
from pws.training.data import ImageData
from pws.training.module import Classifier, NonFiniteLossError
from pws.training.run import method_for, model_for

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


def command(folder: Path, *flags: str) -> list[str]:
    return [
        *(sys.executable, "-m", "pws", "train", "fashion-mnist-allconv-pws", *TINY, *flags),
        *(f"--runs={folder.parent}", f"--name={folder.name}"),
    ]


def run_command(folder: Path, *flags: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    # The timeout is for a hang, as when one of two processes waits for the other for ever.
    run = subprocess.run(command(folder, *flags), capture_output=True, text=True, env=ONE_THREAD, timeout=300)
    assert run.returncode == code, run.stderr
    return run


def test_a_run_leaves_everything(tmp_path: Path) -> None:
    recipe = tiny("--trainer.epochs=3")
    summary = train(recipe, tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert stored["accuracy"] == summary.accuracy
    assert stored["best_accuracy"] >= stored["accuracy"]
    assert (stored["status"], stored["steps"], stored["epochs"]) == ("finished", 12, 3)
    assert stored["first_non_finite_step"] is None
    assert stored["train_seconds"] > 0
    assert stored["images_per_second"] == pytest.approx(12 * 32 / stored["train_seconds"], rel=0.01)
    assert stored["peak_memory_mb"] > 100
    assert stored["versions"]["torch"] == torch.__version__.split("+")[0]
    resolved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert (resolved["model"]["width"], resolved["optim"]["momentum"]) == (0.08, 0.9)
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert [float(r["val_accuracy"]) for r in rows if r["val_accuracy"]][-1] == pytest.approx(summary.accuracy)
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").is_file()


def test_the_resolved_recipe_repeats_the_run(tmp_path: Path) -> None:
    train(tiny("--trainer.epochs=1", "--optim.lr=0.05"), tmp_path / "first", quiet=True)
    train(load_recipe(tmp_path / "first" / "recipe.yaml"), tmp_path / "second", quiet=True)
    assert_equal(weights(tmp_path / "second"), weights(tmp_path / "first"), 0.0)


def test_kill_and_resume(tmp_path: Path) -> None:
    # Loader workers draw batches ahead: the resumed run must not take them from another epoch's order.
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


@pytest.mark.parametrize("method", ["pws", "none"])
def test_two_processes_train_as_one(tmp_path: Path, method: str) -> None:
    # float64, so that the order of sums does not hide a difference in what is summed.
    flags = ("--trainer.epochs=2", "--trainer.precision=64-true", "--data.augment=true", f"--model.method={method}")
    flags = (*flags, "--model.calibrate=all") if method == "pws" else flags
    one = train(tiny(*flags), tmp_path / "one", quiet=True)
    run_command(tmp_path / "two", *flags, "--trainer.devices=2")
    assert_equal(weights(tmp_path / "two"), weights(tmp_path / "one"), 1e-9)
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert (two["steps"], two["accuracy"]) == (one.steps, one.accuracy)
    assert two["test_loss"] == pytest.approx(one.test_loss, rel=1e-6)
    assert two["train_loss"] == pytest.approx(one.train_loss, rel=1e-6)


def test_accumulated_parts_train_as_one_batch(tmp_path: Path) -> None:
    flags = ("--trainer.epochs=2", "--trainer.precision=64-true")
    train(tiny(*flags), tmp_path / "whole", quiet=True)
    summary = train(tiny(*flags, "--trainer.accumulate=4"), tmp_path / "parts", quiet=True)
    assert summary.steps == 8
    assert_equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"), 1e-9)


def test_calibration_runs_once_and_not_on_resume(tmp_path: Path) -> None:
    recipe = tiny("--trainer.epochs=1", "--optim.lr=0", "--model.calibrate=all")
    train(recipe, tmp_path / "run", quiet=True)
    alpha = {key: value for key, value in weights(tmp_path / "run").items() if key.endswith("alpha")}
    assert alpha
    assert all((value != 1).all() for value in alpha.values())
    (tmp_path / "run" / "summary.json").unlink()
    train(recipe, tmp_path / "run", resume=True, quiet=True)
    resumed = weights(tmp_path / "run")
    for key, value in alpha.items():
        assert torch.equal(resumed[key], value)


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
    assert evaluate(tmp_path / "run", "last").accuracy == pytest.approx(summary.accuracy)


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
    assert stored["accuracy"] is None


def test_early_stop(tmp_path: Path) -> None:
    summary = train(tiny("--optim.lr=0", "--trainer.epochs=9", "--trainer.early_stop=2"), tmp_path / "run", quiet=True)
    assert summary.epochs == 3


def test_learning_rate_and_clipping_reach_the_optimizer(tmp_path: Path) -> None:
    start = train(tiny("--optim.lr=0", "--trainer.epochs=1", "--trainer.max_steps=1"), tmp_path / "a", quiet=True)
    train(tiny("--optim.lr=0.1", "--trainer.epochs=1", "--trainer.max_steps=1"), tmp_path / "b", quiet=True)
    assert start.steps == 1
    assert start.accuracy is not None
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    squares = sum(float((first[key] - second[key]).double().square().sum()) for key in first)
    # One SGD step of a gradient clipped to norm 1, and 5e-4 times weights of a norm below 40, which Lightning adds later.
    assert 0.05 < math.sqrt(squares) < 0.1 * (1 + 5e-4 * 40)


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


def first_step(*flags: str) -> dict[str, Tensor]:
    """What one step without momentum and decay adds to each parameter, at learning rate 1."""
    still = ("--optim.momentum=0", "--optim.weight_decay=0", "--optim.schedule=constant", "--optim.lr=1")
    recipe = tiny("--trainer.max_steps=1", *still, *flags)
    data = ImageData(recipe.data, recipe.seed)
    seed_everything(0, verbose=False)
    model = model_for(recipe.model, data.splits)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    module = Classifier(model, recipe.optim, 10, method=method_for(recipe.model))
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, limit_val_batches=0, use_distributed_sampler=False, **quiet
    )
    trainer.fit(module, datamodule=data)
    return {key: p.detach() - before[key] for key, p in model.named_parameters()}


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


def test_one_process_computes_the_kernels_together(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    serves = Prepared.serves

    def look(prepared: Prepared, parameters: Any) -> bool:
        taken.append(serves(prepared, parameters))
        return taken[-1]

    monkeypatch.setattr(Prepared, "serves", look)
    together = first_step()
    assert taken
    assert all(taken)
    monkeypatch.setattr("pws.training.module.standardize_together", lambda _: SimpleNamespace(remove=lambda: None))
    count = len(taken)
    for key, change in first_step().items():
        torch.testing.assert_close(change, together[key], rtol=1e-4, atol=1e-7)
    assert len(taken) == count


def test_the_steps_are_bounded_as_the_recipe_says() -> None:
    assert max(lengths(first_step("--optim.step_bound=null"))) > 0.1
    assert max(lengths(first_step())) == pytest.approx(0.03, rel=1e-3)
    assert max(lengths(first_step("--optim.step_bound=0.01"))) == pytest.approx(0.01, rel=1e-3)
    bounded = first_step("--model.method=none", "--optim.step_bound=0.01")
    assert max(lengths(bounded)) == pytest.approx(0.01, rel=1e-3)
    assert max(lengths(first_step("--model.method=none"))) > 0.03
