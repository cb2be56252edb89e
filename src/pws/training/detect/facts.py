"""What a run keeps of its detection data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from pws.training.detect.data import DetectionData
from pws.training.detect.samples import DetectionSplits, Target, target_of
from pws.training.recipe import DataConfig

SIDE: Final = 96
BOX: Final = (8.0, 8.0, 72.0, 72.0)
STAND_INS: Final = 2


@dataclass(frozen=True)
class ObjectFacts:
    """What a detector must know of its data."""

    classes: list[str]
    keypoints: list[str]
    """The names of each object's keypoints."""
    masks: bool
    """Whether objects have masks."""

    @classmethod
    def of(cls, data: Any) -> ObjectFacts:
        """Those of a run's data."""
        images = data.splits.train
        return cls(list(data.splits.classes), list(images.keypoint_names), bool(images.has_masks))

    def stand_in(self, config: DataConfig, seed: int) -> DetectionData:
        """Random images with an object each, the same for training and test."""
        images = RandomObjects(self)
        return DetectionData(config, seed, DetectionSplits(images, None, images, self.classes))


class RandomObjects:
    """Random images, each with one square object."""

    def __init__(self, facts: ObjectFacts) -> None:
        self.has_masks, self.classes, self.keypoint_names = facts.masks, facts.classes, facts.keypoints
        self.numbers = list(range(STAND_INS))

    def __len__(self) -> int:
        return len(self.numbers)

    def size(self, number: int) -> tuple[int, int]:
        """A square."""
        return SIDE, SIDE

    def name(self, number: int) -> str:
        """Its number."""
        return f"random image {number}"

    def get(self, number: int) -> tuple[Tensor, Target]:
        """The same pixels on every call."""
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randint(0, 256, (3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
        target = target_of([BOX], [1], (SIDE, SIDE))
        if self.has_masks:
            target["masks"] = torch.zeros(1, SIDE, SIDE, dtype=torch.uint8)
            target["masks"][:, 8:72, 8:72] = 1
        if self.keypoint_names:
            target["keypoints"] = torch.tensor([40.0, 40.0, 2.0]).expand(1, len(self.keypoint_names), 3).clone()
        return pixels, target
