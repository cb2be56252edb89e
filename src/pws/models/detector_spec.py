"""What tells one detector from another of its family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

Head = Literal["mlp", "conv"]
LONGEST: Final = 1333 / 800
"""The longer side of an image is at most so many times the shorter one: COCO's custom."""


@dataclass(frozen=True)
class DetectorSpec:
    """What tells one detector from another of its family.

    Args:
        num_classes: of objects, without the background.
        image_size: the shorter side that images are resized to, in pixels; SSD's images are squares of it.
        width: factor on the channels of FPN and heads.
        head: (R-CNN) "mlp", two linear layers on the pooled box, or "conv", four convolutions and a linear layer.
        anchor_size: the side of the smallest anchor, in pixels of the resized image.
        keypoints: (Keypoint R-CNN) of each object.
        options: further arguments of torchvision's class, such as box_batch_size_per_image.
    """

    num_classes: int
    image_size: int
    width: float = 1.0
    head: Head = "mlp"
    anchor_size: int = 32
    keypoints: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def channels(self) -> int:
        """Of FPN and heads."""
        return max(8, round(256 * self.width))

    @property
    def sizes(self) -> dict[str, int]:
        """The shorter and the longer side, in torchvision's words."""
        return {"min_size": self.image_size, "max_size": round(LONGEST * self.image_size)}
