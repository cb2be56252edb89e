"""What a detection dataset is made of: images by number, each with its objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torchvision import tv_tensors

from pws._errors import PwsError
from pws.training.images import read_image

Target = dict[str, Tensor]
"""The objects of one image, in its pixels:

    boxes       (N, 4) float32   left, top, right, bottom; right > left, bottom > top
    labels      (N,) int64       1 to the number of classes; 0 is torchvision's background
    iscrowd     (N,) int64       1 for a crowd in one region: not trained on, and no false alarm
    area        (N,) float32     of the mask where there is one, else of the box
    masks       (N, H, W) uint8  where the data has them
    keypoints   (N, K, 3) float32  x, y, visibility (0 not labelled), where the data has them
    difficult   (N,) bool        (VOC) trained on, but neither hit nor miss in evaluation

Boxes are torchvision's `tv_tensors.BoundingBoxes` and masks its `Mask`, so that transforms.v2 moves them with the image;
keypoints are a plain tensor, which `Augment` moves. A keypoint is at a pixel, and pixels count from 0, as in COCO.
"""


class DetectionImages(Protocol):
    """Images with their objects, by number."""

    has_masks: bool
    classes: list[str]
    """Their labels are 1, 2, ..."""
    keypoint_names: list[str]
    """Of each object's keypoints; empty if the data has none. Names that begin with left_ and right_ are a pair."""
    numbers: list[int]
    """Which images of the files are used, in their order."""

    def __len__(self) -> int: ...

    def size(self, number: int) -> tuple[int, int]:
        """Height and width in pixels, told without reading the image."""

    def name(self, number: int) -> str:
        """The file that an error or a picture names."""

    def get(self, number: int) -> tuple[Tensor, Target]:
        """The pixels `(3, H, W)` uint8 and the objects."""


@dataclass
class DetectionSplits:
    """A dataset, ready to be batched."""

    train: DetectionImages
    validation: DetectionImages | None
    test: DetectionImages
    classes: list[str]
    """Their labels are 1, 2, ..."""


def target_of(
    boxes: Sequence[tuple[float, float, float, float]], labels: Sequence[int], size: tuple[int, int]
) -> Target:
    """The objects of an image of `size` (height, width) by their boxes (left, top, right, bottom) and labels."""
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {
        "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=size),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "iscrowd": torch.zeros(len(boxes), dtype=torch.int64),
        "area": areas(corners, None),
    }


def areas(boxes: Tensor, masks: Tensor | None) -> Tensor:
    """Pixels of each mask, or of each box where there are no masks."""
    if masks is not None:
        return masks.as_subclass(Tensor).sum((1, 2), dtype=torch.float32)
    sides = (boxes[:, 2:] - boxes[:, :2]).as_subclass(Tensor)
    return sides[:, 0] * sides[:, 1]


def read_sized(path: Path, size: tuple[int, int], source: Path) -> Tensor:
    """The pixels of an image that is of the height and width that its annotation file `source` gives."""
    return sized(read_image(path), size, str(path), source)


def sized(pixels: Tensor, size: tuple[int, int], name: str, source: Path | str) -> Tensor:
    """The pixels of the image `name`; raise `PwsError` unless they are of the height and width that `source` gives."""
    height, width = pixels.shape[1:]
    if (height, width) != size:
        raise PwsError(
            f"{source}: {name} is {size[1]} x {size[0]} pixels there, and the file itself {width} x {height}. Was it resized "
            "or turned after it was labelled? The boxes would be wrong: get the image again, or mend its size and boxes."
        )
    return pixels
