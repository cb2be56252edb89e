"""Augmentation: boxes, masks and keypoints go where the image's pixels go."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors

from pws.training.detect.augment import STEPS, Augment, mirrored
from pws.training.detect.drawn import DrawnImages, digit_cutouts
from pws.training.detect.samples import Target, target_of
from pws.training.recipe import Augmentation

NAMES = ["top", "bottom", "left_end", "right_end"]


@pytest.fixture(scope="module")
def scenes() -> DrawnImages:
    return DrawnImages(digit_cutouts()[0], 96, 0, 12)


def rectangle(top: int, left: int, bottom: int, right: int, height: int = 20, width: int = 30) -> tuple[Tensor, Target]:
    """An image that is white where its one object is."""
    mask = torch.zeros(1, height, width, dtype=torch.uint8)
    mask[:, top:bottom, left:right] = 1
    target = target_of([(left, top, right, bottom)], [3], (height, width)) | {"masks": tv_tensors.Mask(mask)}
    middle = (left + right) // 2
    points = [[middle, top, 2], [middle, bottom - 1, 1], [left, top, 2], [right - 1, top, 2]]
    target["keypoints"] = torch.tensor([points]).float()
    target["difficult"] = torch.tensor([True])
    return mask.expand(3, -1, -1) * 255, target


def drawn(
    name: Augmentation, image: Tensor, target: Target, seed: int, size: int | None = None
) -> tuple[Tensor, Target]:
    torch.manual_seed(seed)
    return Augment(name, size, NAMES)(image, target)


def check_in_step(image: Tensor, target: Target, given: Target) -> None:
    """Every key has a row for each object, and fits the image."""
    height, width = image.shape[-2:]
    assert target.keys() == given.keys()
    assert len({len(value) for value in target.values()}) == 1
    assert [target[key].dtype for key in target] == [given[key].dtype for key in target]
    boxes = target["boxes"]
    assert boxes.shape[1:] == (4,)
    assert boxes.canvas_size == (height, width)  # type: ignore[attr-defined]
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes >= 0).all()
    assert (boxes[:, 2] <= width).all()
    assert (boxes[:, 3] <= height).all()


@pytest.mark.parametrize("flipped", [False, True])
def test_a_flip(flipped: bool) -> None:
    image, target = rectangle(4, 5, 10, 17)
    # Of 30 columns, 5 to 16 become 13 to 24.
    seed = next(s for s in range(20) if torch.manual_seed(s) and (torch.rand(()) < 0.5) == flipped)
    pixels, moved = drawn("flip", image, target, seed)
    assert torch.equal(pixels, image.flip(-1) if flipped else image)
    assert torch.equal(moved["masks"][0] * 255, pixels[0])
    assert moved["boxes"].tolist() == [[13, 4, 25, 10] if flipped else [5, 4, 17, 10]]
    assert moved["area"].tolist() == [72]
    mirrored = [[18, 4, 2], [18, 9, 1], [13, 4, 2], [24, 4, 2]]  # the left end is the left end again
    assert moved["keypoints"][0].tolist() == (mirrored if flipped else target["keypoints"][0].tolist())
    assert target["boxes"].tolist() == [[5, 4, 17, 10]], "what was given stays as it was"


def test_a_flip_without_pairs_keeps_the_order_of_keypoints() -> None:
    image, target = rectangle(4, 5, 10, 17)
    flips = Augment("flip", None, ["a", "b", "c", "d"])
    moved = next(
        m for s in range(20) if torch.manual_seed(s) and not torch.equal((m := flips(image, target))[0], image)
    )
    assert moved[1]["keypoints"][0, :, 0].tolist() == [18, 18, 24, 13]


@pytest.mark.parametrize("size", [None, 64])
@pytest.mark.parametrize("name", STEPS)
def test_what_is_left_of_scenes_is_in_step(name: Augmentation, size: int | None, scenes: DrawnImages) -> None:
    counts = set()
    for number in range(len(scenes)):
        image, given = scenes.get(number)
        for seed in range(3):
            pixels, target = drawn(name, image, given, seed, size)
            check_in_step(pixels, target, given)
            counts.add(len(given["labels"]) - len(target["labels"]))
            if name == "jitter":
                assert pixels.shape == (3, size or 96, size or 96)
            assert torch.equal(target["area"], target["masks"].sum((1, 2)).float())
            for mask, box in zip(target["masks"], target["boxes"].tolist(), strict=True):
                rows, columns = mask.nonzero(as_tuple=True)
                assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == box
            for (left, top, right, bottom), points in zip(target["boxes"].tolist(), target["keypoints"], strict=True):
                seen = points[points[:, 2] > 0]
                assert ((seen[:, 0] >= left - 2) & (seen[:, 0] <= right + 2)).all()
                assert ((seen[:, 1] >= top - 2) & (seen[:, 1] <= bottom + 2)).all()
                assert not points[points[:, 2] == 0].any()
    assert counts == {0} if name == "flip" else len(counts) > 1


@pytest.mark.parametrize("name", ["jitter", "ssd"])
def test_boxes_and_masks_stay_where_the_object_is(name: Augmentation) -> None:
    image, target = rectangle(12, 10, 40, 44, 64, 64)
    seen = 0
    for seed in range(40):
        pixels, moved = drawn(name, image, target, seed)
        if name == "jitter" and len(moved["labels"]):
            # The fill is grey: what is brighter than half between it and white is the object, to within its blurred edge.
            bright = (pixels > 190).all(0)
            assert (bright != moved["masks"][0].bool()).sum() <= 2 * (pixels.shape[1] + pixels.shape[2])
        elif len(moved["labels"]):
            inside = pixels.float().mean(0)[moved["masks"][0].bool()]
            assert inside.std() < 60, "one colour, but for the noise of the distortion"
        seen += len(moved["labels"])
        assert moved["labels"].tolist() in ([], [3])
        assert moved["difficult"].tolist() in ([], [True])
    assert seen > 10


def test_keypoints_that_a_crop_cut_off_are_not_labelled() -> None:
    image, target = rectangle(0, 0, 64, 64, 64, 64)
    found = []
    for seed in range(20):
        _, moved = drawn("jitter", image, target, seed)
        found += moved["keypoints"][0].tolist() if len(moved["labels"]) else []
    assert {tuple(point) for point in found if point[2] == 0} == {(0, 0, 0)}
    assert all(-0.5 <= x < 63.5 and -0.5 <= y < 63.5 for x, y, seen in found if seen)
    assert {seen for _, _, seen in found} == {0, 1, 2}


@pytest.mark.parametrize("keys", [("masks", "keypoints", "difficult"), ("keypoints",), ()])
@pytest.mark.parametrize("name", STEPS)
def test_no_objects(name: Augmentation, keys: tuple[str, ...]) -> None:
    image, _ = rectangle(4, 5, 10, 17)
    more = {
        "masks": tv_tensors.Mask(torch.zeros(0, 20, 30, dtype=torch.uint8)),
        **{"keypoints": torch.zeros(0, 4, 3), "difficult": torch.zeros(0, dtype=torch.bool)},
    }
    given = target_of([], [], (20, 30)) | {key: more[key] for key in keys}
    for seed in range(3):
        pixels, moved = drawn(name, image, given, seed)
        check_in_step(pixels, moved, given)
        assert moved["boxes"].shape == (0, 4)
        if "masks" in keys:
            assert moved["masks"].shape == (0, *pixels.shape[1:])


def test_an_image_whose_objects_all_vanish() -> None:
    image, target = rectangle(0, 0, 3, 3, 90, 90)
    vanished = 0
    for seed in range(40):
        pixels, moved = drawn("jitter", image, target, seed)
        check_in_step(pixels, moved, target)
        vanished += not len(moved["labels"])
    assert vanished


@pytest.mark.parametrize("name", STEPS)
def test_boxes_alone(name: Augmentation) -> None:
    image, _ = rectangle(4, 5, 18, 27)
    given = target_of([(5, 4, 27, 18)], [3], (20, 30))
    for seed in range(10):
        pixels, moved = drawn(name, image, given, seed)
        check_in_step(pixels, moved, given)
        sides = moved["boxes"][:, 2:] - moved["boxes"][:, :2]
        assert torch.equal(moved["area"], sides[:, 0] * sides[:, 1])


def test_the_pairs_of_cocos_persons() -> None:
    names = ["nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_knee", "tail", "right_knee", "left_x"]
    assert mirrored(names) == [0, 2, 1, 4, 3, 7, 6, 5, 8]


def test_it_can_be_sent_to_a_process_and_repeats_with_the_seed(scenes: DrawnImages) -> None:
    image, target = scenes.get(3)
    first = drawn("ssd", image, target, 5)
    torch.manual_seed(5)
    second = pickle.loads(pickle.dumps(Augment("ssd", None, NAMES)))(image, target)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1]["boxes"], second[1]["boxes"])
