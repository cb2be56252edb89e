"""Scenes as a detection dataset: what they are made of, and the boxes, masks and keypoints of their objects."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision import datasets as tv
from torchvision.ops import masks_to_boxes

from pws.training.datasets import DEBIAN_FASHION_MNIST, digit_images, fashion_mnist_images
from pws.training.detect.samples import Target, make_target, mirrored_pairs
from pws.training.detect.scenes import Cutouts, Scene, draw_scene

KEYPOINTS: Final = ["top", "bottom", "left_end", "right_end"]
"""The outermost visible pixels of an object."""
PARTS: Final = ("train", "test")
FASHION_HELP: Final = (
    "Get it with `apt install dataset-fashion-mnist` (Debian, Ubuntu), put the files into the folder data, or take "
    "--objects digits."
)


class SceneImages:
    """The first `count` scenes of a part, drawn at once and held in memory."""

    has_masks = True
    keypoints = len(KEYPOINTS)

    def __init__(self, objects: str, part: str, count: int, size: int, seed: int = 0) -> None:
        cutouts = OBJECTS[objects](part)
        self.classes, self.flip_pairs = list(cutouts.classes), mirrored_pairs(KEYPOINTS)
        self.part, self.side = part, size
        number_of_part = PARTS.index(part)
        self.scenes = [draw_scene(cutouts, size, seed=seed, part=number_of_part, number=n) for n in range(count)]

    def __len__(self) -> int:
        return len(self.scenes)

    def size(self, number: int) -> tuple[int, int]:
        """Height and width."""
        return self.side, self.side

    def name(self, number: int) -> str:
        """The file that `pws scenes` would write."""
        return f"{self.part}/{number:06}.png"

    def get(self, number: int) -> tuple[Tensor, Target]:
        """The pixels and the objects."""
        scene = self.scenes[number]
        return torch.from_numpy(scene.image).permute(2, 0, 1).contiguous(), scene_target(scene)


def scene_target(scene: Scene) -> Target:
    """The visible parts of the objects: boxes around their outermost pixels, masks and keypoints."""
    masks = torch.from_numpy(scene.masks)
    boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])  # from the last pixel to its far edge
    target = make_target(boxes, torch.from_numpy(scene.labels) + 1, scene.image.shape[:2], masks=masks.to(torch.uint8))
    target["keypoints"] = torch.stack([_outermost(mask) for mask in masks]) if len(masks) else torch.zeros(0, 4, 3)
    return target


def _outermost(mask: Tensor) -> Tensor:
    """x, y and visibility of `KEYPOINTS`: where several pixels are outermost, the one in their middle."""
    pixels = mask.nonzero()
    found = []
    for axis, end in ((0, pixels.amin(0)), (0, pixels.amax(0)), (1, pixels.amin(0)), (1, pixels.amax(0))):
        ends = pixels[pixels[:, axis] == end[axis]]
        y, x = ends[ends[:, 1 - axis].argsort()][len(ends) // 2].tolist()
        found.append([x, y, 2])
    return torch.tensor(found, dtype=torch.float32)


@cache
def _fashion_mnist(part: str) -> Cutouts:
    both = fashion_mnist_images([Path("data"), Path("data/FashionMNIST/raw"), DEBIAN_FASHION_MNIST], FASHION_HELP)
    pixels, labels = both[PARTS.index(part)]
    return Cutouts(pixels[:, 0].numpy(), labels.numpy(), tv.FashionMNIST.classes, outline=25, mirrored=True)


@cache
def _digits(part: str) -> Cutouts:
    pixels, labels = digit_images()[PARTS.index(part)]
    framed = F.pad(pixels[:, 0], (1, 1, 1, 1))  # the strokes touch the edge, and would end as if cut off there
    return Cutouts(framed.numpy(), labels.numpy(), [str(d) for d in range(10)], outline=110, mirrored=False)


OBJECTS: Final[dict[str, Callable[[str], Cutouts]]] = {"fashion-mnist": _fashion_mnist, "digits": _digits}
"""Name to the objects of a part, train or test."""
