"""`pws diagnose` and `pws train --monitor`, through the command line's own function."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_data import write_folder
from torch import Tensor

from pws import diagnose
from pws.cli import main
from pws.training.model_and_data import load_model, load_run

TRAIN = (
    *("train", "fashion-mnist-allconv-pws", "--data.name=digits", "--data.image_size=12", "--data.train_images=128"),
    *("--data.batch_size=32", "--model.width=0.05", "--trainer.epochs=2", "--trainer.accelerator=cpu"),
    "--trainer.devices=1",
)
PLAIN = ("--model.method=none", "--optim.step_bound=null")
MODULE = """
import torch
from torch import nn

def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))

def grey():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))

def few():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7))

def maps():
    return nn.Conv2d(3, 5, 3)

def no_layer():
    return nn.Sequential(nn.Flatten(), nn.ReLU())

def dictionary():
    return {"model": small()}

def raising():
    raise KeyError("two\\nlines")

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small()

    def forward(self, images):
        return {"name": "x", "logits": self.net(images)}

def long_names():
    model = nn.Module()
    inner = nn.Sequential()
    inner.add_module("a_very_long_name_of_a_submodule_that_holds_convolutions", nn.Conv2d(3, 4, 3))
    inner.add_module("pool", nn.AdaptiveAvgPool2d(1))
    inner.add_module("flat", nn.Flatten())
    inner.add_module("classifier_behind_it_with_a_long_name_too", nn.Linear(4, 10))
    return nn.Sequential(inner)
"""


def strict(text: str) -> Any:
    """Parsed as JSON proper, which knows neither NaN nor Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An importable module with factories."""
    name = f"factories_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    assert main([*TRAIN, f"--runs={runs}", "--name=run", "--monitor=3"]) == 0
    return runs / "run"


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["diagnose", *arguments]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def fail(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert re.fullmatch(r"pws: \S[^\n]+\.\n|pws: [^\n]+ options\)\n|pws: [^\n]+\n", printed.err), printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    return printed.err


# --- pws diagnose ---


@pytest.mark.parametrize("given", ["folder", "last", "best", "init", "file"])
def test_a_run(given: str, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {
        "folder": [str(run_folder)],
        "file": [str(run_folder / "checkpoints" / "best.ckpt")],
    }.get(given, [str(run_folder), f"--checkpoint={given}"])
    found = strict(shown(capsys, *arguments, "--json"))
    name = {"folder": "last", "file": "best"}.get(given, given)
    loaded = load_run(str(run_folder), name)
    if name != "init":
        stored = torch.load(run_folder / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
        for key, value in loaded.model.state_dict().items():
            assert torch.equal(value, stored[f"model.{key}"])
    expected = diagnose(loaded.model, loaded.batch, loaded.loss, lr=0.1, momentum=0.9)
    assert found == expected.to_dict()
    assert (found["lr"], found["momentum"], found["training"]) == (0.1, 0.9, True)
    assert [layer["name"] for layer in found["layers"]][-1] == "head"


def test_checkpoints_of_a_run_differ(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last, init = (strict(shown(capsys, str(run_folder), f"--checkpoint={c}", "--json")) for c in ("last", "init"))
    assert last["loss"] != init["loss"]


@pytest.mark.parametrize("calibrate", ["none", "all"])
def test_the_initial_network_is_the_one_that_takes_the_first_step(
    calibrate: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (f"--runs={tmp_path}", "--name=run", "--monitor", "--trainer.max_steps=1", f"--model.calibrate={calibrate}")
    assert main([*TRAIN, *flags]) == 0
    first = strict((tmp_path / "run" / "diagnosis.json").read_text())["last_healthy"]
    found = strict(shown(capsys, str(tmp_path / "run"), "--checkpoint=init", "--json", f"--lr={first['lr']}"))
    assert first["step"] == 0
    variances = [[layer["output"]["variance"] for layer in d["layers"]] for d in (first, found)]
    assert variances[0] == pytest.approx(variances[1], rel=1e-4)


def test_a_recipe_by_name_and_by_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "model: {name: stack4, method: bn, width: 0.05}\ndata: {name: digits, batch_size: 16}\noptim: {lr: 0.25}\n"
        "trainer: {epochs: 1}\n"
    )
    found = strict(shown(capsys, str(recipe), "--json"))
    assert (found["model"], found["lr"]) == ("Stack", 0.25)
    assert found["layers"][0]["positions"] == 16 * 64
    other = strict(shown(capsys, str(recipe), "--json", "--batch-size=8", "--lr=2", "--momentum=0.5", "--steps=7"))
    assert (other["lr"], other["momentum"], other["steps"]) == (2, 0.5, 7)
    assert other["layers"][0]["positions"] == 8 * 64
    text = shown(capsys, str(recipe), "--lr=0.5")
    assert text.startswith("mine at initialization: batch of 16, learning rate 0.5, momentum 0.9\n")
    assert "at LR 0.5" in text


def test_a_shipped_recipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from pws.training import model_and_data

    load = model_and_data.load_recipe
    flags = ("--data.name=digits", "--data.image_size=12", "--model.width=0.05", "--data.batch_size=8")
    monkeypatch.setattr(model_and_data, "load_recipe", lambda path: load(path, *flags))  # its own data may not be here
    assert "fashion-mnist-allconv-bn at initialization: batch of 8" in shown(capsys, "fashion-mnist-allconv-bn")


@pytest.mark.parametrize("spec", ["timm:test_resnet", "torchvision:squeezenet1_1"])
@pytest.mark.parametrize("data", ["random", "digits"])
def test_models_of_libraries(spec: str, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--model", spec, "--data", data, "--image-size=48", "--batch-size=2")
    found = strict(shown(capsys, *flags, "--json"))
    loaded = load_model(spec, data, batch_size=2, image_size=48)
    assert loaded.images.shape == (2, 3, 48, 48)
    if data == "digits":  # grey, shown as colour
        assert torch.equal(loaded.images[:, 0], loaded.images[:, 2])
        assert found["layers"][0]["input"]["mean"] == pytest.approx(float(loaded.images.mean()), rel=1e-3)
    assert found == diagnose(loaded.model, loaded.batch, loaded.loss).to_dict()
    assert found["lr"] is None
    assert len(found["layers"]) > 8
    fits(shown(capsys, *flags, "--lr=0.5"), f"{spec} on {data}")


def fits(text: str, title: str) -> None:
    """80 columns, but for the first line, and a row a layer."""
    lines = text.splitlines()
    assert title in lines[0]
    assert max(map(len, lines[1:])) <= 80, [line for line in lines[1:] if len(line) > 80]


@pytest.mark.parametrize("factory", ["small", "maps", "Named", "long_names"])
def test_a_factory(factory: str, module: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--model", f"{module}:{factory}", "--image-size=16", "--batch-size=4")
    text = shown(capsys, *flags, "--lr=1")
    fits(text, f"{module}:{factory} on random images: batch of 4, learning rate 1")
    found = strict(shown(capsys, *flags, "--lr=1", "--json"))
    assert found["verdict"]["cause"] + ":" in text
    assert " ".join(found["verdict"]["text"].split()) in " ".join(text.split())
    assert (found["lr"], found["momentum"]) == (1, 0)


def test_grey_models_take_grey_images(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    for data, side in (("random", 16), ("digits", 8)):
        size = () if data == "digits" else ("--image-size=16",)
        found = strict(shown(capsys, "--model", f"{module}:grey", "--data", data, "--batch-size=5", "--json", *size))
        assert found["layers"][0]["kernel_shape"][1] == 1
        assert found["layers"][0]["positions"] == 5 * (side - 2) ** 2


def test_a_folder_of_images(tmp_path: Path, module: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "data", classes=2, images=4, side=40)
    flags = ("--data=folder", f"--root={tmp_path / 'data'}", "--image-size=24", "--batch-size=4")
    found = strict(shown(capsys, "--model", f"{module}:small", *flags, "--json"))
    assert found["layers"][0]["positions"] == 4 * 22**2


@pytest.mark.parametrize("name", ["report.html", "new/folder/report.html", "figure.png", "new/folder/figure.png"])
def test_out(name: str, tmp_path: Path, module: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / name
    text = shown(capsys, "--model", f"{module}:small", "--image-size=16", "--batch-size=4", f"--out={out}")
    assert text.endswith(f"Report: {out}\n")
    content = out.read_bytes()
    if out.suffix == ".png":
        assert content.startswith(b"\x89PNG")
        assert len(content) > 5000
    else:
        assert b"<html" in content[:200]
        assert f"{module}:small on random images".encode() in content
        assert b'http-equiv="refresh"' not in content
    again = ("--model", f"{module}:small", "--image-size=16", "--batch-size=4", f"--out={out}", "--json")
    assert "nothing is overwritten" in fail(capsys, "diagnose", *again)
    assert out.read_bytes() == content
    assert strict(shown(capsys, *again, "--force"))["model"] == "Sequential"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "either a run (its folder, a checkpoint, or a recipe) or --model; got neither"),
        (["RUN", "--model=timm:resnet18"], "or --model; got both"),
        (["fashion-mnist-allconv-bnn"], "did you mean fashion-mnist-allconv-bn"),
        (["--model=timm:resnet19"], "unknown timm model 'resnet19'; did you mean resnet1"),
        (["--model=torchvision:resnet19"], "unknown torchvision model 'resnet19'; did you mean resnet1"),
        (["--model=resnet18"], "torchvision:NAME, timm:NAME or package.module:factory; got 'resnet18'"),
        (["--model=timm:"], "package.module:factory; got 'timm:'"),
        (["--model=no_such_module:f"], "needs the module no_such_module"),
        (["--model=MODULE:smal"], "has no function or class 'smal'; did you mean small"),
        (["--model=MODULE:MODULE"], "has no function or class"),
        (["--model=MODULE:dictionary"], "must give a torch.nn.Module; it gave a dict"),
        (["--model=MODULE:no_layer", "--image-size=8"], "a diagnosis needs a layer with a weight"),
        (["--model=MODULE:small", "--data=digit"], "unknown dataset 'digit'; did you mean digits"),
        (["--model=MODULE:small", "--data=folder", "--root=/nowhere"], "/nowhere/train is missing"),
        (["--model=MODULE:few", "--data=digits"], "labels go up to 9, and the model has 7 outputs"),
        (["--model=MODULE:small", "--image-size=2"], "rejects the batch"),
        (["--model=MODULE:small", "--image-size=0"], "--image-size must be at least 1; got 0"),
        (["--model=MODULE:small", "--batch-size=0"], "--batch-size must be at least 1; got 0"),
        (["RUN", "--batch-size=-1"], "--batch-size must be at least 1; got -1"),
        (["RUN", "--model.method=bn"], "no option --model.method: model takes one value"),
        (["RUN", "--batch-size=1000"], "1000"),
        (["--model=MODULE:grey", "--data=digits", "--batch-size=5000"], "5000"),
        (["RUN", "--lr=-1"], "lr must be positive and finite; got -1"),
        (["RUN", "--lr=0"], "lr must be positive and finite; got 0"),
        (["RUN", "--lr=nan"], "Expected a float. Got value: nan"),
        (["RUN", "--lr=fast"], "Expected a float. Got value: fast"),
        (["RUN", "--momentum=1"], "momentum must be at least 0 and below 1; got 1"),
        (["RUN", "--steps=0"], "steps must be a whole number, at least 1; got 0"),
        (["RUN", "--out=report.pdf"], "--out ends with .html or .png; got 'report.pdf'"),
        (["RUN", "--data=digits"], "--data goes with --model"),
        (["RUN", "--image-size=20"], "--image-size goes with --model"),
        (["RUN", "--root=."], "--root goes with --model"),
        (["RUN", "--checkpoint=first"], "first does not exist"),
        (["RUN/checkpoints/first.ckpt"], "first.ckpt does not exist"),
        (["nowhere/checkpoints/last.ckpt"], "nowhere/recipe.yaml does not exist"),
        (["RUN", "--learning-rate=3"], "learning-rate"),
        (["RUN", "and", "more"], "nrecogni"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_bad_input(
    arguments: list[str],
    told: str,
    module: str,
    run_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {path for path in tmp_path.rglob("*") if "__pycache__" not in str(path)}
    given = [a.replace("RUN", str(run_folder)).replace("MODULE", module) for a in arguments]
    assert told in fail(capsys, "diagnose", *given)
    assert {path for path in tmp_path.rglob("*") if "__pycache__" not in str(path)} == before


def changed(weights: dict[str, Tensor]) -> None:
    weights["model.head.weight"] = torch.zeros(3, 3)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: path.write_bytes(b"cut off"), "is not a checkpoint"),
        (lambda path: path.unlink(), "does not exist"),
        (None, "another architecture"),
    ],
    ids=["garbage", "missing", "another architecture"],
)
def test_a_damaged_run(
    damage: Callable[[Path], None] | None,
    told: str,
    run_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(run_folder, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    if damage is None:
        content = torch.load(path, weights_only=True)
        changed(content["state_dict"])
        torch.save(content, path)
    else:
        damage(path)
    error = fail(capsys, "diagnose", str(tmp_path / "run"))
    assert told in error
    assert str(path) in error
    assert '"loss"' in shown(capsys, str(tmp_path / "run"), "--checkpoint=init", "--json")


# --- pws train --monitor ---


def weights(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return state


def test_a_monitored_run_is_the_run(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN, f"--runs={tmp_path}", "--name=run"]) == 0
    assert "test accuracy" in capsys.readouterr().out
    mine, theirs = weights(run_folder), weights(tmp_path / "run")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (run_folder, tmp_path / "run")]
    for key in ("status", "metrics", "train_loss", "steps", "epochs", "first_non_finite_step"):
        assert summaries[0][key] == summaries[1][key], key
    assert not (tmp_path / "run" / "diagnosis.html").exists()


def test_a_healthy_monitored_run_leaves_a_report(run_folder: Path) -> None:
    found = strict((run_folder / "diagnosis.json").read_text())
    assert found["first_unhealthy"] is None
    assert found["last_healthy"]["step"] == 6  # of 8 steps: 0, 1, 2, 3, 4, 6
    assert found["verdict"] == found["last_healthy"]["verdict"]["text"]
    assert b"<html" in (run_folder / "diagnosis.html").read_bytes()[:200]
    header, *rows = (run_folder / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("monitor/largest_shift_share")
    assert sum(row.split(",")[column] != "" for row in rows) == 6


def test_a_collapsing_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (*PLAIN, "--optim.lr=1e6", f"--runs={tmp_path}", "--name=bad", "--monitor")
    assert main([*TRAIN, *flags]) == 3
    error = capsys.readouterr().err
    folder = tmp_path / "bad"
    found = strict((folder / "diagnosis.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    assert error.count("\n") == 1
    assert f"non-finite at step {summary['first_non_finite_step']}" in error
    assert found["verdict"] in error
    assert error.endswith(f"Report: {folder / 'diagnosis.html'}\n")
    assert summary["status"] == "non-finite"
    assert found["verdict"] == found["first_unhealthy"]["verdict"]["text"]
    assert found["first_unhealthy"]["verdict"]["cause"] != "healthy"
    assert found["first_unhealthy"]["step"] > found["last_healthy"]["step"] >= 0
    assert found["first_unhealthy"]["step"] <= summary["first_non_finite_step"]
    assert found["last_healthy"]["lr"] == pytest.approx(1e6 * (1 - found["last_healthy"]["step"] / 8))
    assert found["first_unhealthy"]["verdict"]["layer"] in {la["name"] for la in found["first_unhealthy"]["layers"]}
    page = (folder / "diagnosis.html").read_text()
    assert found["first_unhealthy"]["verdict"]["layer"] in page
    # Without a monitor the same run ends at the same step, with advice instead of a verdict.
    assert main([*TRAIN, *PLAIN, "--optim.lr=1e6", f"--runs={tmp_path}", "--name=alone"]) == 3
    alone = capsys.readouterr().err
    assert "--monitor tells why" in alone
    assert alone.split(". ")[0] == error.split(". ")[0]
    other = json.loads((tmp_path / "alone" / "summary.json").read_text())
    assert {k: other[k] for k in ("steps", "first_non_finite_step", "first_non_finite_layer")} == {
        k: summary[k] for k in ("steps", "first_non_finite_step", "first_non_finite_layer")
    }


@pytest.mark.parametrize(
    ("value", "told"), [("0", "at least 1; got 0"), ("-5", "at least 1; got -5"), ("x", "monitor")]
)
def test_a_wrong_monitor(value: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told in fail(capsys, *TRAIN, f"--runs={tmp_path}", f"--monitor={value}")
    assert not any(tmp_path.iterdir())


def test_a_monitored_run_resumes(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    assert main([*TRAIN, f"--runs={tmp_path}", "--name=run", "--resume", "--monitor"]) == 0
    assert math.isfinite(json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]["accuracy"])
    assert "resuming" in capsys.readouterr().out
