"""Scenes: exact boxes, masks and keypoints, the same for the same seed; and the files that `pws scenes` writes."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from pws.training.detect.scene_images import KEYPOINTS, OBJECTS, SceneImages, scene_target
from pws.training.detect.scenes import SMALLEST, Scene, draw_scene


@pytest.fixture(scope="module")
def digits() -> SceneImages:
    return SceneImages("digits", "train", 60, 96)


def test_boxes_areas_and_keypoints_of_a_mask() -> None:
    mask = np.zeros((6, 9), bool)
    mask[1, 4] = mask[4, 5] = True
    mask[2, 2:8] = mask[3, 3:7] = True
    target = scene_target(Scene(np.zeros((6, 9, 3), np.uint8), np.stack([mask]), np.array([6])))
    assert target["boxes"].tolist() == [[2, 1, 8, 5]]
    assert target["area"].tolist() == [12]
    assert target["labels"].tolist() == [7]
    points = dict(zip(KEYPOINTS, target["keypoints"][0].tolist(), strict=True))
    assert points == {"top": [4, 1, 2], "bottom": [5, 4, 2], "left_end": [2, 2, 2], "right_end": [7, 2, 2]}


def test_objects_are_visible_and_apart(digits: SceneImages) -> None:
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


def test_a_scene_without_objects(digits: SceneImages) -> None:
    number = next(n for n in range(len(digits)) if not len(digits.scenes[n].labels))
    shapes = {name: tuple(value.shape) for name, value in digits.get(number)[1].items()}
    assert shapes == {
        **{"boxes": (0, 4), "labels": (0,), "iscrowd": (0,), "area": (0,)},
        **{"masks": (0, 96, 96), "keypoints": (0, 4, 3)},
    }


def test_a_scene_depends_on_seed_part_and_number_alone() -> None:
    cutouts = OBJECTS["digits"]("train")

    def drawn(seed: int, part: int, number: int) -> bytes:
        scene = draw_scene(cutouts, 64, seed=seed, part=part, number=number)
        return scene.image.tobytes() + scene.masks.tobytes()

    places = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    assert len({drawn(*place) for place in places}) == 4
    assert [drawn(*place) for place in places] == [drawn(*place) for place in places]


@pytest.mark.needs("fashion-mnist")
def test_scenes_of_fashion_stay_what_results_were_measured_on() -> None:
    scene = draw_scene(OBJECTS["fashion-mnist"]("train"), 160, seed=0, part=0, number=3)
    assert hashlib.sha256(scene.masks.tobytes()).hexdigest()[:16] == "b9683ba8102b0d48"


def test_digits_for_testing_are_others_than_for_training() -> None:
    train, test = (OBJECTS["digits"](part) for part in ("train", "test"))
    assert (len(train.labels), len(test.labels)) == (1437, 360)
    assert not any((image == train.pixels[train.labels == label]).all((1, 2)).any()
                   for image, label in zip(test.pixels[:50], test.labels[:50], strict=True))  # fmt: skip
