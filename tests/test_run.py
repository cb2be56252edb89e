"""Runs: what they leave behind, how they resume and end."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from small_runs import assert_equal, tiny, weights

from pws._errors import PwsError
from pws.training import evaluate, load_recipe, train
from pws.training.module import NonFiniteLossError


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


@pytest.mark.parametrize(
    ("changed", "message"),
    [("--optim.lr=0.3", "optim differs"), ("--seed=5", "seed differs"), ("--trainer.epochs=2", "trainer differs")],
)
def test_resume_with_another_recipe(tmp_path: Path, changed: str, message: str) -> None:
    train(tiny("--trainer.epochs=1"), tmp_path / "run", quiet=True)
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(PwsError, match=message):
        train(tiny("--trainer.epochs=1", changed), tmp_path / "run", resume=True, quiet=True)


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
    assert evaluate(tmp_path / "run", summary.checkpoint).accuracy == pytest.approx(summary.metrics["accuracy"])


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


def test_mixed_precision(tmp_path: Path) -> None:
    summary = train(tiny("--trainer.precision=bf16-mixed", "--trainer.epochs=1"), tmp_path / "run", quiet=True)
    assert summary.status == "finished"
    assert all(value.dtype == torch.float32 for key, value in weights(tmp_path / "run").items() if "model" in key)
