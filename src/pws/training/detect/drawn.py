"""Scenes drawn when they are asked for: digits in the package, and what `pws scenes` writes to files."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes

from pws.training.datasets import (
    DEBIAN_FASHION_MNIST,
    DIGIT_CLASSES,
    FASHION_CLASSES,
    FASHION_PARTS,
    digit_arrays,
    fashion_arrays,
)
from pws.training.detect.samples import Target, target_of
from pws.training.detect.scenes import Cutouts, draw_scene

KEYPOINTS: Final = ("top", "bottom", "left_end", "right_end")
"""The outermost visible pixels of an object."""
FASHION_FOLDERS: Final = (Path("data"), Path("data/FashionMNIST/raw"), DEBIAN_FASHION_MNIST)
FASHION_HELP: Final = (
    "Get it with `apt install dataset-fashion-mnist` (Debian, Ubuntu), put the files into the folder data, or take --objects "
    "digits."
)


class DrawnImages:
    """`count` scenes of one part of a dataset, `side` pixels per side."""

    has_masks = True

    def __init__(self, cutouts: Cutouts, side: int, part: int, count: int, seed: int = 0) -> None:
        self.cutouts, self.side, self.part, self.seed = cutouts, side, part, seed
        self.classes, self.keypoint_names = list(cutouts.classes), list(KEYPOINTS)
        self.numbers = list(range(count))

    def __len__(self) -> int:
        return len(self.numbers)

    def size(self, number: int) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.side, self.side

    def name(self, number: int) -> str:
        """Of the file that it would be."""
        return f"{self.numbers[number]:06}.png"

    def get(self, number: int) -> tuple[Tensor, Target]:
        """Pixels and objects of a scene."""
        scene = draw_scene(self.cutouts, self.side, seed=self.seed, part=self.part, number=self.numbers[number])
        masks = torch.from_numpy(scene.masks)
        target = target_of(_boxes(masks), (scene.labels + 1).tolist(), (self.side, self.side))
        target["area"] = masks.sum((1, 2)).float()
        target["masks"] = tv_tensors.Mask(masks.to(torch.uint8))
        target["keypoints"] = _ends(masks)
        return torch.from_numpy(scene.image).permute(2, 0, 1).contiguous(), target


def _boxes(masks: Tensor) -> list[tuple[float, float, float, float]]:
    """From the left and upper edge of the outermost pixels to the right and lower edge."""
    if not len(masks):
        return []
    corners = masks_to_boxes(masks)
    corners[:, 2:] += 1
    return [tuple(box) for box in corners.tolist()]


def _ends(masks: Tensor) -> Tensor:
    """The outermost pixels: top, bottom, left, right, all visible; the one in the middle where several are outermost."""
    found = torch.full((len(masks), len(KEYPOINTS), 3), 2.0)
    for points, mask in zip(found, masks, strict=True):
        pixels = mask.nonzero()
        first, last = pixels.amin(0), pixels.amax(0)
        for point, (axis, end) in zip(points, ((0, first), (0, last), (1, first), (1, last)), strict=True):
            ends = pixels[pixels[:, axis] == end[axis]]
            point[:2] = ends[ends[:, 1 - axis].argsort()][len(ends) // 2].flip(0)
    return found


def digit_cutouts() -> tuple[Cutouts, Cutouts]:
    """scikit-learn's digits of 8 x 8 pixels, for training and for testing."""
    train, test = (_digits(*part) for part in digit_arrays())
    return train, test


def _digits(pixels: Tensor, labels: Tensor) -> Cutouts:
    # A blurred edge of the few pixels would be as wide as a stroke; and a mirrored digit is none.
    return Cutouts(pixels[:, 0].numpy(), labels.numpy(), DIGIT_CLASSES, outline=110, mirrored=False)


def fashion_cutouts() -> tuple[Cutouts, Cutouts]:
    """Fashion-MNIST's images, 60,000 for training and 10,000 for testing.

    Raises:
        PwsError: the files are missing.
    """
    train, test = (_fashion(*fashion_arrays(part, FASHION_FOLDERS, FASHION_HELP)) for part in FASHION_PARTS)
    return train, test


def _fashion(pixels: Tensor, labels: Tensor) -> Cutouts:
    return Cutouts(pixels[:, 0].numpy(), labels.numpy(), FASHION_CLASSES)
