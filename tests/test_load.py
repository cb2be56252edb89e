"""`pws.load`: a run's network where its data are not, equal to the network that was trained; what is missing is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import write_npz
from torch import Tensor, nn

import pws
from pws.cli import main
from pws.training import Recipe, load_recipe, train
from pws.training._evaluate import load_trained
from pws.training.facts import DATA
from pws.training.tasks import TASKS, data_of, module_of
from pws.training.trained import TrainedDetector

FACTORY = """
from torch import nn

def build(num_classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, num_classes),
    )
"""


def recipe(*flags: str) -> Recipe:
    common = ("--model.width=0.08", "--data.batch_size=8", "--data.validation=0.2", "--trainer.epochs=1")
    return load_recipe("fashion-mnist-allconv-pws", *common, "--trainer.accelerator=cpu", "--trainer.devices=1", *flags)


def trained_and_moved(folder: Path, *flags: str, channels: int = 1) -> tuple[Path, Tensor, Tensor]:
    """A run that was copied, its data gone; the test images as bytes, and what its network said of them."""
    write_npz(folder / "data.npz", channels=channels)
    train(recipe("--data.name=npz", f"--data.root={folder / 'data.npz'}", *flags), folder / "run", quiet=True)
    trained = load_trained(folder / "run")
    with torch.no_grad():
        expected = trained.module.eval()(next(iter(trained.data.test_dataloader()))[0])
    pixels = torch.from_numpy(np.load(folder / "data.npz")["test_images"])
    shutil.move(folder / "run", folder / "copy")
    (folder / "data.npz").unlink()
    return folder / "copy", pixels[:, None] if channels == 1 else pixels.permute(0, 3, 1, 2), expected


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, Tensor]:
    return trained_and_moved(tmp_path_factory.mktemp("moved"))


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "their_net.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "their_net", raising=False)
    return tmp_path / "their_net.py"


def assert_same(run: Path, images: Tensor, expected: Tensor) -> None:
    model = pws.load(run)
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(images.double() / 255), expected, rtol=1e-4, atol=1e-4, check_dtype=False)
    assert torch.equal(model.predict(images), expected.argmax(1))
    assert model.classes == [str(label) for label in range(10)]


def test_a_copied_run_says_without_its_data_what_it_said_with_them(moved: tuple[Path, Tensor, Tensor]) -> None:
    run, images, expected = moved
    before = torch.get_rng_state()
    assert_same(run, images, expected)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", ["pws", "nf", "none"])
def test_a_model_of_others_is_built_from_its_factory(method: str, tmp_path: Path, factory: Path) -> None:
    flags = ("--model.name=their_net:build", f"--model.method={method}", "--model.width=1")
    assert_same(*trained_and_moved(tmp_path, *flags, channels=3))
    factory.unlink()
    sys.modules.pop("their_net")
    with pytest.raises(pws.PwsError, match="needs the module their_net"):
        pws.load(tmp_path / "copy")


def test_predict_needs_no_data_and_evaluate_does(
    moved: tuple[Path, Tensor, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, images, expected = moved
    Image.fromarray(images[3, 0].numpy()).save(tmp_path / "image.png")
    assert main(["predict", str(run), str(tmp_path / "image.png"), "--out", str(tmp_path / "out")]) == 0
    said = json.loads((tmp_path / "out" / "image.json").read_text())["classes"]
    assert said[0]["label"] == int(expected[3].argmax())
    assert said[0]["probability"] == pytest.approx(float(expected[3].softmax(0).max()), abs=1e-5)
    assert main(["evaluate", str(run)]) == 2
    assert "data.npz" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("images", "got"),
    [
        (torch.zeros(1, 16, 16, dtype=torch.uint8), r"\(1, 16, 16\)"),
        (torch.zeros(2, 3, 16, 16), r"\(2, 3, 16, 16\)"),
        (torch.zeros(2, 1, 16, 16, dtype=torch.int64), "int64"),
    ],
)
def test_other_images_are_refused(moved: tuple[Path, Tensor, Tensor], images: Tensor, got: str) -> None:
    with pytest.raises(pws.PwsError, match=rf"takes images \(N, 1, height, width\).*got .*{got}"):
        pws.load(moved[0]).predict(images)


def spoil(run: Path, kind: str) -> str:
    """Break a run; returns what the error says."""
    content = json.loads((run / DATA).read_text())
    if kind == "no folder":
        (run / "recipe.yaml").unlink()
        return "is no run folder"
    if kind == "no facts":
        (run / DATA).unlink()
        return "older version of pws.*pws evaluate"
    if kind == "no checkpoint":
        shutil.rmtree(run / "checkpoints")
        return "does not exist"
    wrong = {
        "cut off": (json.dumps(content)[:-9], "cannot read"),
        "no mean": (json.dumps({key: value for key, value in content.items() if key != "mean"}), "mean"),
        "other type": (json.dumps({**content, "channels": "red"}), "channels"),
        "other size": (json.dumps({**content, "channels": 3}), "another architecture"),
    }
    (run / DATA).write_text(wrong[kind][0])
    return wrong[kind][1]


@pytest.mark.parametrize(
    "kind", ["no folder", "no facts", "no checkpoint", "cut off", "no mean", "other type", "other size"]
)
def test_what_is_missing_or_damaged_is_named(kind: str, moved: tuple[Path, Tensor, Tensor], tmp_path: Path) -> None:
    shutil.copytree(moved[0], tmp_path / "run")
    words = spoil(tmp_path / "run", kind)
    with pytest.raises(pws.PwsError, match=words):
        pws.load(tmp_path / "run")


def test_evaluate_writes_what_an_older_run_lacks(tmp_path: Path) -> None:
    flags = ("--data.name=digits", "--data.image_size=12", "--data.train_images=64", "--trainer.max_steps=1")
    train(recipe(*flags), tmp_path / "run", quiet=True)
    before = (tmp_path / "run" / DATA).read_bytes()
    (tmp_path / "run" / DATA).unlink()
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / DATA).read_bytes() == before


SMALL = ("--task=detect", "--data.name=digit-scenes", "--data.image_size=64", "--data.augment=false")


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("mask-rcnn-resnet18", "pws"),
        ("fcos-resnet18", "nf"),
        ("ssdlite-mobilenetv3", "bn"),
        ("mask-rcnn-resnet18", "ws"),
    ],
)
def test_a_detector_is_the_same_without_its_data(name: str, method: str) -> None:
    width = "1" if name.startswith("ssdlite") else "0.125"
    chosen = recipe(*SMALL, f"--model.name={name}", f"--model.method={method}", f"--model.width={width}")
    data = data_of(chosen)
    facts = TASKS["detect"].facts.of(data)
    wanted: Any = module_of(chosen, data, fresh=False)
    found: Any = module_of(chosen, facts.stand_in(chosen.data, 0), fresh=False)
    found.load_state_dict(wanted.state_dict())
    image, _ = data.splits.test.get(0)  # type: ignore[attr-defined]
    models = [TrainedDetector(each.model, facts.classes, chosen, Path("best.ckpt")) for each in (wanted, found)]
    (first,), (second,) = (model.predict([image], score=0.0) for model in models)
    assert len(first["scores"]) > 0
    for key, value in first.items():
        torch.testing.assert_close(second[key], value)


class Finder(nn.Module):
    """Finds two objects, one of them unsure."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        assert all(float(image.max()) == 1 for image in images)
        return [{"labels": torch.tensor([1, 2]), "scores": torch.tensor([0.3, 0.9])} for _ in images]


def test_a_detector_leaves_out_what_it_is_not_sure_of() -> None:
    model = TrainedDetector(Finder(), ["cat", "dog"], Recipe(), Path("best.ckpt"))
    images = [torch.full((3, 8, 8), 255, dtype=torch.uint8), torch.ones(3, 9, 7)]
    assert [found["labels"].tolist() for found in model.predict(images)] == [[2], [2]]
    assert [found["labels"].tolist() for found in model.predict(images, score=0.2)] == [[1, 2]] * 2


def test_without_the_training_extra_the_error_says_how_to_get_it() -> None:
    code = "import sys, pws\nsys.modules['lightning'] = None\ntry: pws.load('run')\nexcept pws.PwsError as e: print(e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "pip install 'pws-torch[train]'" in done.stdout
