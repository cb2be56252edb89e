"""`pws convert`, and recipes with models of others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from pws._errors import PwsError
from pws.cli import main
from pws.methods import APPLIED
from pws.training import Recipe, train
from pws.training.data import ImageData
from pws.training.network import model_for
from pws.training.recipe_file import recipe_of

NAMES = "trains with model.method none, bn, frozen-bn, gn, ws, nf, pws-paper, pws"
OWN_NETWORKS = ("ln", "in", "sn", "frn", "wn", "centred", "gc", "skipinit")
LOADED = """
from load import model, example
import pws
print(tuple(model.eval()(example).shape), sum(p.numel() for p in model.parameters()), len(pws.marked(model)))
"""


@pytest.mark.parametrize(
    ("form", "marks", "training"),
    [
        ("optimizer", 14, "an optimizer of pws.optim trains it"),
        ("layers", 0, "any optimizer trains it, with pws.clip_grad"),
    ],
)
def test_the_command(form: str, marks: int, training: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "converted"
    arguments = ["convert", "--model", "timm:resnet10t", "--image-size", "64", "--batch-size", "4", "--out", str(out)]
    assert main([*arguments, "--form", form]) == 0
    printed = capsys.readouterr().out
    assert "standardize 14, remove 14" in printed
    assert training in printed
    assert "conv1.1" in (out / "plan.txt").read_text()
    assert training in (out / "load.py").read_text().partition("\n")[0]
    done = subprocess.run(
        [sys.executable, "-c", LOADED], cwd=out, capture_output=True, text=True, check=True, timeout=120
    )
    state = torch.load(out / "weights.pt")
    assert any(key.endswith("alpha") for key in state) == (form == "layers")
    assert done.stdout == f"(2, 1000) {sum(tensor.numel() for tensor in state.values())} {marks}\n"
    assert main(arguments) == 2
    assert "nothing is overwritten" in capsys.readouterr().err


def test_an_unknown_form_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "converted"
    arguments = ["convert", "--model", "timm:resnet10t", "--image-size", "32", "--out", str(out), "--form", "layer"]
    assert main(arguments) == 2
    assert "unknown form of conversion 'layer'; did you mean layers" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("flag", ["--batch-size", "--image-size"])
def test_sizes_below_one_are_refused(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("0", "-3"):
        assert main(["convert", "--model", "timm:resnet10t", flag, value, "--out", str(tmp_path / "out")]) == 2
        assert f"{flag} must be at least 1; got {value}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def of_others(name: str, **settings: Any) -> Recipe:
    given = {"model.name": name, "data.name": "digits", "data.image_size": 32, "trainer.accelerator": "cpu"}
    given |= {"data.train_images": 64, "data.batch_size": 8, "trainer.max_steps": 2, "optim.lr": 1e-3}
    return recipe_of(given | {key.replace("__", "."): value for key, value in settings.items()})


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("timm:mobilenetv3_small_050", method) for method in APPLIED),
        *(("torchvision:mobilenet_v3_small", method) for method in ("bn", "pws")),
        *(("pws.models.small:resnet18", method) for method in ("bn", "pws")),
    ],
)
def test_a_model_of_others_trains_from_a_recipe(name: str, method: str, tmp_path: Path) -> None:
    recipe = of_others(name, model__method=method)
    summary = train(recipe, tmp_path / "run", quiet=True)
    assert summary.status == "finished"
    model = model_for(recipe.model, ImageData(recipe.data, 0).splits)
    norms = {type(m).__name__.removesuffix("Act2d").removesuffix("2d") for m in model.modules()}
    expected = {"bn": {"BatchNorm"}, "frozen-bn": {"FrozenBatchNorm"}, "none": set(), "nf": set(), "pws": set()}
    assert norms & {"BatchNorm", "FrozenBatchNorm", "GroupNorm"} == expected.get(method, {"GroupNorm"})
    assert model.eval()(torch.randn(1, 1, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({"model__method": name}, f"{NAMES}, without.*got method {name},") for name in OWN_NETWORKS),
        ({"model__width": 0.5}, "without model.width and model.dropout; got method pws, width 0.5"),
        ({"model__dropout": 0.5}, "dropout 0.5"),
        ({"model__method": "gn", "model__gamma": 0.1}, "the method gn has no option 'gamma'; it has: none"),
        ({"model__gain": "relu"}, "the method pws has no option 'gain'; it has: gamma, relative_gamma"),
        ({"model__standardize_head": False}, "no option 'standardize_head'; it has: gamma, relative_gamma"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_a_model_of_others_does_not_take(settings: dict[str, Any], message: str) -> None:
    recipe = of_others("timm:resnet10t", **settings)
    with pytest.raises(PwsError, match=message):
        model_for(recipe.model, ImageData(recipe.data, 0).splits)


def test_the_command_names_the_methods_of_models_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model.name=timm:resnet10t", "--data.name=digits", "--data.image_size=32", f"--runs={tmp_path}"]
    assert main(["train", "fashion-mnist-allconv-pws", "--model.method=ln", *arguments]) == 2
    said = capsys.readouterr().err
    assert f"{NAMES}, without" in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


KINDS = {
    "sequence": ("nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.AdaptiveAvgPool1d(1)", ["3", "32"]),
    "volume": ("nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.AdaptiveAvgPool3d(1)", ["3", "6", "8", "10"]),
    "table": ("nn.Linear(20, 8), nn.BatchNorm1d(8), nn.ReLU()", ["20"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_sequences_volumes_and_tables(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layers, shape = KINDS[kind]
    code = f"from torch import nn\ndef build():\n    return nn.Sequential({layers}, nn.Flatten(), nn.Linear(8, 4))\n"
    (tmp_path / f"of_{kind}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    model = ["--model", f"of_{kind}:build", "--input-shape", *shape]
    assert main(["convert", *model, "--out", str(tmp_path / "out")]) == 0
    assert "standardize 1, remove 1" in capsys.readouterr().out
    assert main(["diagnose", *model, "--json"]) == 0
    capsys.readouterr()
    for wrong in (["--image-size", "8"], ["--data", "digits"]):
        assert main(["diagnose", *model, *wrong]) == 2
        assert "--input-shape" in capsys.readouterr().err
    assert main(["diagnose", *model[:3], "0"]) == 2
    assert "each at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["complex", "text", "list", "none"])
def test_weights_of_the_wrong_kind_are_refused(wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state: Any = torchvision.models.resnet18().state_dict()
    state["conv1.weight"] = state["conv1.weight"].to(torch.cfloat) if wrong == "complex" else "text"
    torch.save({"list": [state], "none": None}.get(wrong, state), tmp_path / "weights.pt")
    arguments = ["--model=torchvision:resnet18", f"--weights={tmp_path / 'weights.pt'}", "--image-size=32"]
    assert main(["convert", *arguments, f"--out={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "must be a state dict of the model" in said
    assert not (tmp_path / "out").exists()
