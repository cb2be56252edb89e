"""`pws bench loader`: a loader beside the steps that take its images. Times themselves are never asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from pws.bench import loader_speed
from pws.bench.loader_speed import LoaderSpeed, measure_loader
from pws.cli import main
from pws.cli.loader import _table
from pws.training.recipe import DataConfig, ModelConfig, OptimConfig, Recipe, TrainerConfig
from pws.training.samplers import TrainSampler

RECIPE = Recipe(
    name="small",
    model=ModelConfig(width=0.08),
    data=DataConfig(image_size=12, train_images=320, batch_size=64),
    optim=OptimConfig(lr=1e9),
    trainer=TrainerConfig(accelerator="cpu", accumulate=2),
)


def test_it_times_an_epoch_and_some_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    steps: list[float] = []
    draw, fit = TrainSampler.__iter__, Trainer.fit

    def drawn(sampler: TrainSampler) -> object:
        for key in draw(sampler):
            taken.append(len(key[1]))
            yield key

    def fitted(trainer: Trainer, *arguments: object, **named: object) -> None:
        fit(trainer, *arguments, **named)  # type: ignore[arg-type]
        steps.append(trainer.global_step)

    monkeypatch.setattr(TrainSampler, "__iter__", drawn)
    monkeypatch.setattr(Trainer, "fit", fitted)
    speed = measure_loader(RECIPE, 1e-3)
    assert (speed.batch, speed.workers) == (32, 0), "a part of a step, where steps accumulate"
    assert set(taken) == {32}
    assert speed.loaded == 32 * (len(taken) - 1), "the first batch waits for the start"
    assert steps == [speed.steps + loader_speed.WARM]
    assert speed.steps >= loader_speed.FEWEST
    assert min(speed.loader, speed.model) > 0
    assert speed.ratio == pytest.approx(speed.loader / speed.model, rel=1e-3)


@pytest.mark.parametrize(("ratio", "told"), [(1.5, "keeps up"), (0.5, "raise --data.workers")])
def test_the_table_says_who_waits(ratio: float, told: str) -> None:
    table = _table(
        "small", LoaderSpeed(loader=100 * ratio, model=100.0, ratio=ratio, loaded=9, steps=3, batch=3, workers=2)
    )
    assert told in str(table.caption)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--data.name=digits", "--data.image_size=12", "--data.train_images=64", "--data.batch_size=32"]
    command = ["bench", "loader", "fashion-mnist-allconv-pws", *small, "--model.width=0.08", "--seconds=0.01"]
    assert main([*command, "--trainer.accelerator=cpu", f"--out={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    assert "images/s" in shown
    assert "loader, " in shown
    result = json.loads((tmp_path / "loader.json").read_text())
    assert {"command", "commit", "device", "versions", "recipe", "loader", "model", "ratio"} <= set(result)
    assert main([*command, f"--out={tmp_path}"]) == 2
    assert "loader.json exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--seconds=1"], "the recipe comes first"),
        (["fashion-mnist-allconv-pws", "--seconds=0"], "--seconds must be positive"),
        (["nowhere"], "unknown recipe"),
        (["fashion-mnist-allconv-pws", "--data.name=stream", "--data.root=nowhere"], "nowhere/pws.json is missing"),
        (
            ["fashion-mnist-allconv-pws", "--data.name=digits", "--data.batch_size=99999"],
            "must be at most the number of",
        ),
    ],
)
def test_wrong_input(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "loader", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
