"""Scenes: exact boxes, masks and keypoints, the same for the same seed; and the files that `pws scenes` writes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pws.cli import main
from pws.training.detect.datasets import load_detection_splits
from pws.training.detect.drawn import KEYPOINTS, DrawnImages, digit_cutouts, fashion_cutouts
from pws.training.detect.scenes import SMALLEST, Scene, draw_scene
from pws.training.recipe import DataConfig


@pytest.fixture(scope="module")
def digits() -> DrawnImages:
    return DrawnImages(digit_cutouts()[0], 96, 0, 60)


def test_boxes_areas_and_keypoints_of_a_mask(monkeypatch: pytest.MonkeyPatch, digits: DrawnImages) -> None:
    mask = np.zeros((6, 9), bool)
    mask[1, 4] = mask[4, 5] = True
    mask[2, 2:8] = mask[3, 3:7] = True
    scene = Scene(np.zeros((6, 9, 3), np.uint8), np.stack([mask]), np.array([6]))
    monkeypatch.setattr("pws.training.detect.drawn.draw_scene", lambda *_, **__: scene)
    target = digits.get(0)[1]
    assert target["boxes"].tolist() == [[2, 1, 8, 5]]
    assert target["area"].tolist() == [12]
    assert target["labels"].tolist() == [7]
    points = dict(zip(KEYPOINTS, target["keypoints"][0].tolist(), strict=True))
    assert points == {"top": [4, 1, 2], "bottom": [5, 4, 2], "left_end": [2, 2, 2], "right_end": [7, 2, 2]}


def test_objects_are_visible_and_apart(digits: DrawnImages) -> None:
    counts = []
    for number in range(len(digits)):
        pixels, target = digits.get(number)
        assert (pixels.shape, pixels.dtype) == ((3, 96, 96), torch.uint8)
        masks = target["masks"].bool()
        counts.append(len(masks))
        assert int(masks.sum(0).max() if len(masks) else 0) <= 1, "one object a pixel"
        assert all(area >= SMALLEST for area in target["area"])
        for mask, (left, top, right, bottom) in zip(masks, target["boxes"].int().tolist(), strict=True):
            assert mask[top:bottom, left:right].sum() == mask.sum()
            assert mask[top].any()
            assert mask[bottom - 1].any()
            assert mask[:, left].any()
            assert mask[:, right - 1].any()
        for mask, points in zip(masks, target["keypoints"].int().tolist(), strict=True):
            assert all(mask[y, x] for x, y, _ in points)
    assert min(counts) == 0
    assert max(counts) >= 5


def test_a_scene_without_objects(digits: DrawnImages) -> None:
    number = next(n for n in range(len(digits)) if not len(digits.get(n)[1]["labels"]))
    shapes = {name: tuple(value.shape) for name, value in digits.get(number)[1].items()}
    assert shapes == {
        **{"boxes": (0, 4), "labels": (0,), "iscrowd": (0,), "area": (0,)},
        **{"masks": (0, 96, 96), "keypoints": (0, 4, 3)},
    }


def test_a_scene_depends_on_seed_part_and_number_alone() -> None:
    cutouts = digit_cutouts()[0]

    def drawn(seed: int, part: int, number: int) -> bytes:
        scene = draw_scene(cutouts, 64, seed=seed, part=part, number=number)
        return scene.image.tobytes() + scene.masks.tobytes()

    places = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    assert len({drawn(*place) for place in places}) == 4
    assert [drawn(*place) for place in places] == [drawn(*place) for place in places]


@pytest.mark.needs("fashion-mnist")
def test_scenes_of_fashion_stay_what_results_were_measured_on() -> None:
    scene = draw_scene(fashion_cutouts()[0], 160, seed=0, part=0, number=3)
    assert hashlib.sha256(scene.masks.tobytes()).hexdigest()[:16] == "d82a7256ae4e0b26"


def test_digits_for_testing_are_others_than_for_training() -> None:
    train, test = digit_cutouts()
    assert (len(train.labels), len(test.labels)) == (1437, 360)
    assert not any((image == train.pixels[train.labels == label]).all((1, 2)).any()
                   for image, label in zip(test.pixels[:50], test.labels[:50], strict=True))  # fmt: skip


SMALL = ["--objects", "digits", "--train", "30", "--test", "5", "--size", "48", "--jobs", "1"]


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "scenes"
    assert main(["scenes", str(out), *SMALL]) == 0
    return out


def test_the_files_hold_what_was_drawn(written: Path) -> None:
    splits = load_detection_splits(DataConfig(name="scenes", root=str(written.parent), validation=0), seed=0)
    assert (splits.classes, splits.train.keypoint_names) == ([str(digit) for digit in range(10)], list(KEYPOINTS))
    for part, (images, count) in enumerate(((splits.train, 30), (splits.test, 5))):
        drawn = DrawnImages(digit_cutouts()[part], 48, part, count)
        assert len(images) == count
        for number in range(count):
            (pixels, target), (expected, objects) = images.get(number), drawn.get(number)
            assert torch.equal(pixels, expected)
            assert target.keys() == objects.keys()
            assert all(torch.equal(target[key], objects[key]) for key in objects)


def test_the_json_says_what_it_was_made_of(written: Path) -> None:
    content = json.loads((written / "annotations" / "test.json").read_text())
    settings = {"train": 30, "test": 5, "size": 48, "objects": "digits", "seed": 0}
    assert settings.items() <= content["info"].items()
    assert [entry["id"] for entry in content["annotations"]] == list(range(1, len(content["annotations"]) + 1))
    assert {entry["iscrowd"] for entry in content["annotations"]} == {0}
    with Image.open(written / "sheet.png") as sheet:
        assert min(sheet.size) >= 1000


def test_the_same_seed_gives_the_same_bytes(written: Path, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()  # an empty folder may be there
    for name, seed in (("again", "0"), ("other", "1")):
        assert main(["scenes", str(tmp_path / name), *SMALL, "--seed", seed]) == 0
    assert files_in(tmp_path / "again") == files_in(written)
    assert files_in(tmp_path / "other")["train/000000.png"] != files_in(written)["train/000000.png"]


@pytest.mark.slow
def test_processes_change_nothing(written: Path, tmp_path: Path) -> None:
    assert main(["scenes", str(tmp_path / "out"), *SMALL[:-1], "2"]) == 0
    assert files_in(tmp_path / "out") == files_in(written)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--train", "0"], "--train must be 1 to"),
        (["--test", "-3"], "--test must be 1 to"),
        (["--size", "8"], "--size must be 32 to"),
        (["--seed", "-1"], "--seed must be 0 to"),
        (["--objects", "digit"], "digit"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--train", "many"], "train"),
    ],
)
def test_wrong_settings(arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scenes", str(tmp_path / "out"), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["folder", "file"])
def test_nothing_is_overwritten(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    assert main(["scenes", str(tmp_path / name), *SMALL]) == 2
    assert str(tmp_path / name) in capsys.readouterr().err
    assert files_in(tmp_path) == {"folder/mine": b"mine", "file": b"mine"}


def test_what_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pws.cli.scenes.scene_sheet", full)
    assert main(["scenes", str(tmp_path / "out"), *SMALL]) == 2
    assert list(tmp_path.iterdir()) == []


def test_missing_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("pws.training.detect.drawn.FASHION_FOLDERS", (tmp_path,))
    monkeypatch.setattr("pws.training.detect.write_scenes._loaded", {})
    assert main(["scenes", str(tmp_path / "out"), "--jobs", "1"]) == 2
    assert "or take --objects digits" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["scenes", "--help"])
    assert "Example: pws scenes data/scenes" in capsys.readouterr().out
