"""Generated input at every command: exit code 0 or 2, no traceback, at most three lines, no file changed by a failure."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Final

import pytest
import timm
import torch
import yaml
from changed_files import contents, damage, structure
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from small_data import write_folder, write_npz

from pws.bench import pool
from pws.cli import main, speed

RECIPE: Final[dict[str, Any]] = {
    "model": {"name": "stack4", "method": "pws", "width": 0.05},
    "data": {"name": "digits", "train_images": 64, "batch_size": 32, "augment": False},
    "optim": {"lr": 0.01, "schedule": "step", "milestones": [1]},
    "trainer": {"epochs": 1, "accelerator": "cpu", "devices": 1},
}
GRID: Final = {
    "title": "small",
    "settings": {"model": {"name": "stack4", "width": 0.05}, "data": {"name": "digits"}, "trainer": {"max_steps": 2}},
    "columns": [{"optim.lr": 0.1}, {"optim.lr": 0.2}],
    "rows": {"bn": {}, "pws": {"seeds": [1, 2]}},
}
CELL: Final = {"row": "bn", "column": "LR 0.1", "seed": 0, "accuracy": 0.5, "non_finite_step": None}
RESULT: Final = {
    "grid": "g",
    "target": 0.8,
    "settings": {"data.name": "digits"},
    "rows": {"bn": {}},
    "columns": {"LR 0.1": {"optim.lr": 0.1}},
    "cells": [{**CELL, "steps_to_target": 1}],
}
EXAMPLES: Final = 200
# Each command with the files that it reads.
COMMANDS: Final[dict[tuple[str, ...], list[str]]] = {
    ("evaluate", "run"): ["run/recipe.yaml", "run/checkpoints/best.ckpt"],
    ("evaluate", "run", "--checkpoint=last", "--json"): ["run/checkpoints/last.ckpt"],
    ("diagnose", "run", "--json"): ["run/recipe.yaml", "run/checkpoints/last.ckpt"],
    ("diagnose", "recipe.yaml", "--out=out/report.png"): ["recipe.yaml"],
    ("export", "run", "--format=safetensors", "--out=out/a.safetensors"): [
        "run/recipe.yaml",
        "run/checkpoints/best.ckpt",
    ],
    ("train", "run", "--resume"): [
        "run/recipe.yaml",
        "run/checkpoints/last.ckpt",
        "run/metrics.csv",
        "run/summary.json",
    ],
    ("train", "stopped", "--resume"): [
        f"stopped/{name}" for name in ("recipe.yaml", "checkpoints/last.ckpt", "metrics.csv")
    ],
    ("train", "recipe.yaml", "--runs=out"): ["recipe.yaml"],
    ("federate", "recipe.yaml", "--runs=out", "--data.batch_size=8", "--federated.clients=2", "--federated.rounds=1"): [
        "recipe.yaml"
    ],
    ("train", "npz.yaml", "--runs=out"): ["npz.yaml", "data.npz"],
    ("train", "folder.yaml", "--runs=out"): ["folder.yaml", "data/train/class0/0.png", "data/val/class1/1.png"],
    ("convert", "--model=timm:test_resnet", "--image-size=32", "--weights=weights.pt", "--out=out"): ["weights.pt"],
    ("bench", "accuracy", "grid.yaml", "--out=out"): ["grid.yaml"],
    ("bench", "accuracy", "grid.yaml", "--out=results"): ["results/grid.json"],
    ("bench", "speed", "--model=timm:test_resnet", "--out=out"): [],
    ("demo", "--epochs=0"): [],
    ("bench", "shift", "--out=page.md"): [],
}
FLAGS: Final = (
    *(
        "--out",
        "--runs",
        "--name",
        "--seed",
        "--json",
        "--batch-size",
        "--image-size",
        "--checkpoint",
        "--format",
        "--jobs",
    ),
    *(
        "--lr",
        "--steps",
        "--model",
        "--data",
        "--keep",
        "--norms",
        "--form",
        "--weights",
        "--resume",
        "--monitor",
        "--seconds",
    ),
    *("--data.batch_size", "--data.image_size", "--data.name", "--data.root", "--data.workers", "--model.method"),
    *("--model.name", "--model.width", "--model.gain", "--model.num_classes", "--optim.lr", "--optim.milestones"),
    *(
        "--trainer.devices",
        "--trainer.precision",
        "--trainer.max_steps",
        "--trainer.accelerator",
        "--nonsense",
        "-x",
        "--",
    ),
)
WORDS: Final = (
    "",
    "-1",
    "0",
    "1",
    "x",
    "[]",
    "{}",
    "[1",
    "null",
    "nan",
    "-1e400",
    f"1{'0' * 30}",
    "true",
    "a\0b",
    "ü/\x1b[1m",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    here = Path.cwd()
    os.chdir(folder)
    write_npz(folder / "data.npz", side=12)
    write_folder(folder / "data", classes=2, images=2, side=40)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    for name, root, more in (("npz", "data.npz", {}), ("folder", "data", {"image_size": 16})):
        data = {"name": name, "root": root, "batch_size": 4, **more}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**RECIPE, "data": data}))
    (folder / "grid.yaml").write_text(yaml.safe_dump(GRID))
    (folder / "results").mkdir()
    (folder / "results" / "grid.json").write_text(json.dumps(RESULT))
    (folder / "page.md").write_text("a page\n")
    torch.save(timm.create_model("test_resnet").state_dict(), folder / "weights.pt")
    assert main(["train", "recipe.yaml", "--runs=.", "--name=run"]) == 0
    shutil.copytree(folder / "run", folder / "stopped")
    (folder / "stopped" / "summary.json").unlink()
    os.chdir(here)
    return folder


@pytest.fixture(autouse=True)
def _no_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a grid or a model that happens to be right would do takes minutes."""
    monkeypatch.setattr(pool, "each_apart", lambda *_: iter(()))
    monkeypatch.setattr(speed, "compare_model", lambda *_: {})


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_commands_are_right_before_they_are_changed(
    command: tuple[str, ...], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    always_wrong = command[0] == "demo" or command[1] == "shift" or command[:2] == ("train", "run")
    assert main(command) == (2 if always_wrong else 0)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_generated_input(
    data: st.DataObject, base: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = list(data.draw(st.sampled_from(sorted(COMMANDS))))
    files = COMMANDS[tuple(arguments)]
    folder = tmp_path_factory.mktemp("case") / "here"
    shutil.copytree(base, folder)
    if files and data.draw(st.booleans()):
        path = folder / data.draw(st.sampled_from(files))
        change = structure if path.suffix in (".yaml", ".json") and data.draw(st.booleans()) else damage
        change(data.draw, path)
    else:
        flag, word = data.draw(st.sampled_from(FLAGS)), data.draw(st.sampled_from(WORDS))
        arguments.append(f"{flag}={word}" if data.draw(st.booleans()) else flag)
    before, here = contents(folder), Path.cwd()
    capsys.readouterr()
    os.chdir(folder)
    try:
        code = main(arguments)
    finally:
        os.chdir(here)
    said = capsys.readouterr().err
    event(f"{arguments[0]}: exit code {code}")
    assert code in (0, 2), (arguments, said)
    assert "Traceback" not in said
    assert said.count("\n") <= 3, said
    if code:
        assert said.splitlines()[-1].startswith("pws: "), (arguments, said)
        assert contents(folder) == before, arguments
    shutil.rmtree(folder)
