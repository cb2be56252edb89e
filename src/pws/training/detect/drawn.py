"""Scenes drawn when they are asked for: digits in the package, and what `pws scenes` writes to files."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes

from pws.training.datasets import DIGIT_CLASSES, FASHION_CLASSES, FASHION_PARTS, digit_arrays, fashion_arrays
from pws.training.detect.samples import Target, target_of
from pws.training.detect.scenes import Cutouts, draw_scene

KEYPOINTS: Final = ("top", "bottom", "left_end", "right_end")
"""The outermost visible pixels of an object."""


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
    """The centres of the outermost pixels: top, bottom, left, right; all visible."""
    found = torch.ones(len(masks), len(KEYPOINTS), 3)
    for points, mask in zip(found, masks, strict=True):
        y, x = mask.nonzero(as_tuple=True)
        chosen = torch.stack([y.argmin(), y.argmax(), x.argmin(), x.argmax()])
        points[:, 0], points[:, 1] = x[chosen] + 0.5, y[chosen] + 0.5
    return found


def digit_cutouts() -> tuple[Cutouts, Cutouts]:
    """scikit-learn's digits of 8 x 8 pixels, for training and for testing."""
    train, test = (_cutouts(*part, DIGIT_CLASSES) for part in digit_arrays())
    return train, test


def fashion_cutouts() -> tuple[Cutouts, Cutouts]:
    """Fashion-MNIST's images, 60,000 for training and 10,000 for testing.

    Raises:
        PwsError: the files are missing.
    """
    train, test = (_cutouts(*fashion_arrays(part), FASHION_CLASSES) for part in FASHION_PARTS)
    return train, test


def _cutouts(pixels: Tensor, labels: Tensor, classes: list[str]) -> Cutouts:
    return Cutouts(pixels[:, 0].numpy(), labels.numpy(), classes)
