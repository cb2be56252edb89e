"""What a detection dataset is made of: images by number, each with its objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Target = dict[str, Tensor]
"""The objects of one image, in its pixels:

    boxes       (N, 4) float32   left, top, right, bottom; right > left, bottom > top
    labels      (N,) int64       1 to the number of classes; 0 is torchvision's background
    iscrowd     (N,) int64       1 for a crowd in one region: not trained on, and no false alarm
    area        (N,) float32     of the mask where there is one, else of the box
    masks       (N, H, W) uint8  where the data has them
    keypoints   (N, K, 3) float32  x, y, visibility (0 not labelled), where the data has them
    difficult   (N,) bool        (VOC) trained on, but neither hit nor miss in evaluation

Boxes are torchvision's `tv_tensors.BoundingBoxes`, masks `Mask` and keypoints carry their image's size, so that
transforms.v2 moves them with the image.
"""


class DetectionImages(Protocol):
    """Images with their objects, by number."""

    has_masks: bool
    keypoints: int
    """Of each object; 0 if the data has none."""

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
    test: DetectionImages
    classes: list[str]
    """Their labels are 1, 2, ..."""
