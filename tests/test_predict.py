"""`pws predict`: a picture and a JSON file per image, with the numbers of the network; wrong files stop it before it writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as rle
from PIL import Image
from small_data import write_folder
from torch import Tensor, nn

from pws.cli import main
from pws.training._evaluate import load_trained
from pws.training.detect.objects import SeenObject
from pws.training.detect.pictures import draw_objects
from pws.training.pictures import GREEN
from pws.training.predict import predictor
from pws.training.recipe import Recipe
from pws.training.trained import TrainedDetector

TRAIN = ("--model.width=0.125", "--trainer.epochs=1", "--trainer.accelerator=cpu", "--trainer.devices=1")


def trained(runs: Path, *data: str) -> Path:
    arguments = ["train", "fashion-mnist-allconv-pws", *TRAIN, *data, f"--runs={runs}", "--name=run"]
    assert main(arguments) == 0
    return runs / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    digits = ("--data.name=digits", "--data.image_size=16", "--data.train_images=64", "--data.batch_size=32")
    return trained(tmp_path_factory.mktemp("runs"), *digits)


@pytest.fixture
def files(run: Path, tmp_path: Path) -> list[Path]:
    """The first test images as grey files, and the first of them in colour."""
    images, _ = load_trained(run).data.splits.test.get([0, 1])  # type: ignore[attr-defined]
    paths = [tmp_path / "in" / f"{name}.png" for name in ("first", "second", "colour")]
    paths[0].parent.mkdir()
    for path, pixels in zip(paths, (images[0], images[1], images[0]), strict=True):
        grey = Image.fromarray(pixels[0].numpy())
        (grey.convert("RGB") if path.stem == "colour" else grey).save(path)
    return paths


def test_a_classifier_says_of_a_file_what_it_says_of_the_test_image(
    run: Path, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(run), *map(str, files), "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["1/3", "2/3", "3/3"]
    loaded = load_trained(run)
    images, _ = next(iter(loaded.data.test_dataloader()))
    with torch.no_grad():
        expected = loaded.module.eval()(images[:2]).softmax(1)
    for file, probabilities in zip(files, (*expected, expected[0]), strict=True):
        said = json.loads((tmp_path / "out" / f"{file.stem}.json").read_text())["classes"]
        best = probabilities.topk(5)
        assert [one["label"] for one in said] == best.indices.tolist()
        assert [one["class"] for one in said] == [str(label) for label in best.indices.tolist()]
        assert [one["probability"] for one in said] == pytest.approx(best.values.tolist(), abs=1e-5)
        with Image.open(tmp_path / "out" / f"{file.stem}.png") as picture:
            assert picture.width > 800


def test_a_folder_runs_files_are_resized_and_cropped_as_its_test_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "data", classes=2, images=3, side=40)
    run = trained(
        tmp_path,
        "--data.name=folder",
        f"--data.root={tmp_path / 'data'}",
        "--data.image_size=32",
        "--data.batch_size=2",
    )
    capsys.readouterr()
    loaded = load_trained(run)
    file = tmp_path / "data" / "val" / "class1" / "2.png"
    assert main(["predict", str(run), str(file), "--json", "--out", str(tmp_path / "out")]) == 0
    (said,) = json.loads(capsys.readouterr().out)
    inputs, _ = loaded.data.batches(loaded.data.splits.test, train=False)[0, [5]]
    with torch.no_grad():
        expected = loaded.module.eval()(inputs).softmax(1)[0]
    assert {one["class"]: one["probability"] for one in said["classes"]} == pytest.approx(
        {"class0": float(expected[0]), "class1": float(expected[1])}, abs=1e-5
    )


def wrong(kind: str, folder: Path) -> tuple[list[str], str]:
    """Arguments behind a good file, and a part of the error."""
    (folder / "text.png").write_text("no image")
    (folder / "cut.png").write_bytes((folder / "first.png").read_bytes()[:-40])
    (folder / "first.jpg").write_bytes((folder / "first.png").read_bytes())
    return {
        "missing": ([str(folder / "none.png")], "none.png does not exist"),
        "text": ([str(folder / "text.png")], "cannot read the image"),
        "cut": ([str(folder / "cut.png")], "cannot read the image"),
        "folder": ([str(folder)], f"Give {folder}/*"),
        "twins": ([str(folder / "first.jpg")], "would both be written to"),
        "itself": (["--out", str(folder), "--force"], "would replace the image itself"),
        "score": (["--score", "0.3"], "--score is for detectors"),
        "checkpoint": (["--checkpoint", "third"], "third"),
    }[kind]


@pytest.mark.parametrize("kind", ["missing", "text", "cut", "folder", "twins", "itself", "score", "checkpoint"])
def test_wrong_arguments_write_nothing(
    kind: str, run: Path, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, words = wrong(kind, files[0].parent)
    before = {path: path.read_bytes() for path in files[0].parent.iterdir()}
    assert main(["predict", "--out", str(tmp_path / "out"), str(run), str(files[0]), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert {path: path.read_bytes() for path in files[0].parent.iterdir()} == before


def test_nothing_is_overwritten_without_force(
    run: Path, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "first.json").write_text("mine")
    arguments = ["predict", str(run), str(files[0]), "--out", str(tmp_path)]
    assert main(arguments) == 2
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "first.json").read_text() == "mine"
    assert main([*arguments, "--force"]) == 0
    assert "classes" in json.loads((tmp_path / "first.json").read_text())


class Finder(nn.Module):
    """A detector that finds the bright rectangle of an image, in class 2, and something unsure."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        found = []
        for image in images:
            assert float(image.max()) == 1.0
            there = image[0] > 0.5
            rows, columns = there.any(1).nonzero()[:, 0], there.any(0).nonzero()[:, 0]
            box = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
            found.append(
                {
                    "boxes": torch.stack([box * 0.5, box]),
                    "labels": torch.tensor([1, 2]),
                    "scores": torch.tensor([0.3, 0.9]),
                    "masks": there.float()[None, None].repeat(2, 1, 1, 1),
                    "keypoints": torch.ones(2, 1, 3) * box[:3],
                    "keypoints_scores": torch.tensor([[0.1], [7.0]]),
                }
            )
        return found


def detector() -> TrainedDetector:
    return TrainedDetector(Finder(), ["cat", "dog"], Recipe(name="finder"), Path("best.ckpt"))


def test_a_detector_gives_boxes_masks_and_keypoints_in_pixels_of_the_file() -> None:
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[:, 10:30, 20:50] = 255
    said = predictor(detector())(image)
    record = said.record()
    assert (record["height"], record["width"], len(record["objects"])) == (40, 60, 1)
    (dog,) = record["objects"]
    assert (dog["label"], dog["class"], dog["box"]) == (2, "dog", [20, 10, 50, 30])
    assert dog["score"] == pytest.approx(0.9)
    assert dog["keypoints"] == [[20, 10, 7]]
    assert np.array_equal(rle.decode(dog["mask"]).astype(bool), image[0].numpy() > 0)
    assert said.line() == "1 dog"
    assert said.picture(image).size == (640, 427)
    assert predictor(detector(), 0.2)(image).line() == "1 dog, 1 cat"
    assert predictor(detector(), 0.95)(image).record()["objects"] == []


def test_a_photo_is_looked_at_upright(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its EXIF data say: the camera lay on its side."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:10, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    monkeypatch.setattr("pws.training.predict.trained_of", lambda *_, **__: detector())
    assert main(["predict", "run", str(tmp_path / "photo.png"), "--out", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "photo.json").read_text())
    assert (record["height"], record["width"]) == (60, 40)
    assert record["objects"][0]["box"] == [30, 0, 40, 20]


def one(box: list[float], score: float | None, name: str = "dog") -> SeenObject:
    return SeenObject(1, name, torch.tensor(box), score)


def test_true_objects_are_green_and_found_ones_are_not() -> None:
    image, box = torch.zeros(3, 100, 100, dtype=torch.uint8), [20.0, 40.0, 80.0, 90.0]
    for score in (None, 0.9):
        drawn = np.asarray(draw_objects(image, [one(box, score)], 400))
        # The corner of the box below the name, at the image's fourfold size.
        assert (tuple(drawn[360, 200]) == GREEN) == (score is None)
        assert drawn[360, 200].any()
        assert not drawn[395:].any()


def test_names_do_not_lie_on_each_other() -> None:
    """Twenty objects in one place: what is written differs from the field's colour, and no name hides another."""
    image, placed = torch.zeros(3, 100, 100, dtype=torch.uint8), list[tuple[float, ...]]()
    original = draw_objects.__globals__["_meet"]

    def spy(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
        placed.append(second)
        found: bool = original(first, second)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pws.training.detect.pictures._meet", spy)
        draw_objects(image, [one([40.0, 40.0, 60.0, 60.0], 0.9 - 0.01 * k) for k in range(20)], 400)
    names = list(dict.fromkeys(placed))
    assert len(names) >= 8
    assert not any(original(a, b) for k, a in enumerate(names) for b in names[:k])
    assert all(0 <= left < right <= 400 and 0 <= top < bottom <= 400 for left, top, right, bottom in names)
