"""A detector from its recipe to its predictions: train, evaluate with a sheet, predict."""

from __future__ import annotations

import csv
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pws.cli import main
from pws.cli.evaluate import MEANING
from pws.training._evaluate import load_trained
from pws.training.results import DetectionEvaluation
from pws.training.sheet import COUNT, LargestLoss, LowestF1, counts, write_sheet

RECIPE = """
name: tiny
task: detect
model: {name: mask-rcnn-resnet18, method: bn, width: 0.03, anchor_size: 16, options: {box_detections_per_img: 5}}
data: {name: digit-scenes, batch_size: 2, image_size: 64, train_images: 8}
trainer: {epochs: 1, max_steps: 2, accelerator: cpu, devices: 1}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detector")
    (folder / "tiny.yaml").write_text(RECIPE)
    assert main(["train", str(folder / "tiny.yaml"), f"--runs={folder}", "--name=run"]) == 0
    return folder / "run"


def test_evaluate_agrees_with_the_run_and_writes_a_sheet(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "new" / "sheet.png"
    arguments = ["evaluate", str(run), "--json", "--sheet", str(sheet)]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], len(found["per_class"]), len(found["boxes"]), len(found["masks"])) == (50, 10, 12, 12)
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    logged = {
        kind: float(next(row[f"val_{kind}_ar100"] for row in rows if row[f"val_{kind}_ar100"]))
        for kind in ("box", "mask")
    }
    assert found["boxes"]["ar100"] == pytest.approx(logged["box"], abs=1e-6)
    assert found["masks"]["ar100"] == pytest.approx(logged["mask"], abs=1e-6)
    with Image.open(sheet) as picture:
        assert picture.width > 1500
    assert main(arguments) == 2
    assert "--force" in capsys.readouterr().err


def test_the_tables_of_a_detector(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = {name: 0.01 * number for number, name in enumerate(MEANING)}
    masks: dict[str, float | None] = {**dict.fromkeys(MEANING, 0.5), "ap_large": None}
    per_class = {"cat": {"box_ap": 0.123, "mask_ap": 0.456, "voc_ap50": None}}
    evaluation = DetectionEvaluation("best.ckpt", 50, {**boxes}, masks, 0.789, {**per_class})
    monkeypatch.setattr("pws.cli.evaluate.evaluate", lambda *_: evaluation)
    assert main(["evaluate", "run"]) == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [row[1:] for row in rows if len(row) == 3][:12] == [
        [f"{number}.0", "-" if name == "ap_large" else "50.0"] for number, name in enumerate(MEANING)
    ]
    assert ["VOC's AP, overlap 0.5", "78.9", ""] in rows
    assert ["cat", "12.3", "45.6", "-"] in rows
    monkeypatch.setattr("pws.cli.evaluate.evaluate", lambda *_: replace(evaluation, masks=None, per_class={}))
    assert main(["evaluate", "run"]) == 0
    assert "mask" not in capsys.readouterr().out


def test_predict_says_of_a_file_what_the_network_finds_in_the_test_image(run: Path, tmp_path: Path) -> None:
    loaded = load_trained(run)
    batches = loaded.data.batches(loaded.data.splits.test, train=False)
    (image,), _ = batches[0, [3]]
    with torch.no_grad():
        (expected,) = loaded.module.eval()([image])
    file = tmp_path / "image.png"
    Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(file)
    assert main(["predict", str(run), str(file), "--score", "0", "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "image.json").read_text())["objects"]
    assert [one["score"] for one in found] == pytest.approx(expected["scores"].tolist(), abs=1e-5)
    assert np.allclose([one["box"] for one in found], expected["boxes"].tolist(), atol=1e-2)
    assert all(one["mask"]["size"] == list(image.shape[1:]) for one in found)


BOX, OTHER = [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 40.0, 40.0]


def found(*objects: tuple[list[float], int, float]) -> dict[str, Tensor]:
    return {
        "boxes": torch.tensor([box for box, _, _ in objects]).reshape(-1, 4),
        "labels": torch.tensor([label for _, label, _ in objects], dtype=torch.int64),
        "scores": torch.tensor([score for _, _, score in objects]),
    }


def there(*objects: tuple[list[float], int, int]) -> dict[str, Tensor]:
    return {
        "boxes": torch.tensor([box for box, _, _ in objects]).reshape(-1, 4),
        "labels": torch.tensor([label for _, label, _ in objects], dtype=torch.int64),
        "iscrowd": torch.tensor([crowd for _, _, crowd in objects], dtype=torch.int64),
    }


@pytest.mark.parametrize(
    ("predictions", "objects", "expected"),
    [
        ([], [], (0, 0, 0)),
        ([(BOX, 1, 0.9)], [(BOX, 1, 0)], (1, 0, 0)),
        ([(BOX, 1, 0.4)], [(BOX, 1, 0)], (0, 0, 1)),
        ([(BOX, 2, 0.9)], [(BOX, 1, 0)], (0, 1, 1)),
        ([(BOX, 1, 0.9), (BOX, 1, 0.8)], [(BOX, 1, 0), (OTHER, 1, 0)], (1, 1, 1)),
        ([(BOX, 1, 0.9)], [(BOX, 1, 1)], (0, 0, 0)),
        ([(OTHER, 1, 0.9)], [], (0, 1, 0)),
    ],
)
def test_right_false_and_missed(predictions: list[Any], objects: list[Any], expected: tuple[int, int, int]) -> None:
    assert counts(found(*predictions), there(*objects)) == expected


class Numbered:
    """Test images of one grey each."""

    classes = ("cat", "dog")

    def __init__(self) -> None:
        self.test = self

    def get(self, number: Any) -> tuple[Tensor, Any]:
        pixels = torch.full((3, 30, 40), number if isinstance(number, int) else number[0], dtype=torch.uint8)
        return (pixels, {}) if isinstance(number, int) else (pixels[None], torch.zeros(1))

    def name(self, number: int) -> str:
        return f"image {number}"


def seen(worst: Any, batches: list[tuple[Any, Any]]) -> list[str]:
    for outputs, targets in batches:
        worst.on_test_batch_end(None, None, outputs, (None, targets))
    return [shown.text for shown in worst.shown]


def test_the_lowest_f1_comes_first(tmp_path: Path) -> None:
    whole, half = (found((BOX, 1, 0.9)), there((BOX, 1, 0))), (found((BOX, 1, 0.9)), there((BOX, 1, 0), (OTHER, 1, 0)))
    none, two = (found(), there((BOX, 1, 0))), (found(), there((BOX, 1, 0), (OTHER, 2, 0)))
    worst = LowestF1(Numbered())
    pairs = [whole, half, none, two, (found(), there())]
    batches = [({"found": [a for a, _ in part]}, [b for _, b in part]) for part in (pairs[:2], pairs[2:])]
    assert seen(worst, batches) == [
        "image 3\nF1 0.00: 0 right, 0 false, 2 missed",
        "image 2\nF1 0.00: 0 right, 0 false, 1 missed",
        "image 1\nF1 0.67: 1 right, 0 false, 1 missed",
        "image 0\nF1 1.00: 1 right, 0 false, 0 missed",
        "image 4\nF1 1.00: 0 right, 0 false, 0 missed",
    ]
    assert [np.asarray(shown.picture)[-1, 0, 0] for shown in worst.shown] == [3, 2, 1, 0, 4]
    write_sheet(worst, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 10_000


def test_the_largest_loss_comes_first_and_few_are_kept() -> None:
    sure = torch.linspace(-3, 3, 3 * COUNT)
    logits = torch.stack([sure, torch.zeros_like(sure)], 1)
    worst = LargestLoss(Numbered())
    texts = seen(worst, [(logits[:40], torch.zeros(40).long()), (logits[40:], torch.zeros(len(sure) - 40).long())])
    assert [text.split("\n")[0] for text in texts] == [f"image {number}" for number in range(COUNT)]
    wrong = torch.nn.functional.cross_entropy(logits[:1], torch.zeros(1).long())
    assert texts[0] == f"image 0\nloss {wrong:.2f}, true cat ({100 * torch.exp(-wrong):.1f} %)\nfound dog (95.3 %)"


def test_convert_takes_detectors_with_their_objects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "converted"
    model = ["convert", "--model=torchvision:ssdlite320_mobilenet_v3_large", "--data=digit-scenes", "--batch-size=2"]
    assert main([*model, f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    assert "remove 70" in printed
    spec = importlib.util.spec_from_file_location("load", out / "load.py")
    assert spec is not None
    assert spec.loader is not None
    load = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(load)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in load.model.modules())
    assert len(load.model.eval()(load.example)) == 2


def test_a_detector_without_objects_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = "--model=torchvision:ssdlite320_mobilenet_v3_large"
    for command in (["convert", model, f"--out={tmp_path / 'new'}"], ["diagnose", model]):
        assert main(command) == 2
        assert "unknown dataset with objects" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
