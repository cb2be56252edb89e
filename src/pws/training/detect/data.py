"""Batches of a detection dataset: lists of images and of their objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pws.training.data import RecipeData, seeded
from pws.training.detect.augment import Augment
from pws.training.detect.datasets import load_detection_splits
from pws.training.detect.samples import DetectionImages, DetectionSplits, Target
from pws.training.detect.stream import StreamObjects
from pws.training.recipe import DataConfig
from pws.training.samplers import Key


class DetectionBatches(Dataset[tuple[list[Tensor], list[Target]]]):
    """Images `(3, H, W)` float32 in [0, 1] and their objects, by epoch and image numbers."""

    def __init__(self, images: DetectionImages, seed: int, augment: Augment | None = None, *, crowds: bool) -> None:
        self.images, self.seed, self.augment, self.crowds = images, seed, augment, crowds

    def __getitem__(self, key: Key) -> tuple[list[Tensor], list[Target]]:
        epoch, numbers = key
        samples = [self._sample(epoch, number) for number in numbers]
        return [image for image, _ in samples], [target for _, target in samples]

    def _sample(self, epoch: int, number: int) -> tuple[Tensor, Target]:
        image, target = self.images.get(number)
        if self.augment is not None:
            with seeded(self.seed, epoch, number):
                image, target = self.augment(image, target)
        kept = torch.ones_like(target["iscrowd"], dtype=torch.bool) if self.crowds else target["iscrowd"] == 0
        plain = {name: value.as_subclass(Tensor)[kept] for name, value in target.items()}
        return image.as_subclass(Tensor).float() / 255, plain


class DetectionData(RecipeData):
    """Images with their objects; a training batch holds wide or high images alone, as long as there are enough."""

    splits: DetectionSplits

    def __init__(self, config: DataConfig, seed: int, splits: DetectionSplits | None = None) -> None:
        super().__init__(config, seed)
        self.splits = splits or load_detection_splits(config, seed)

    def batches(self, images: DetectionImages, *, train: bool) -> DetectionBatches:
        """Training images augmented as the recipe says and without crowds; test images as they are."""
        chosen = "flip" if self.config.augment is True else self.config.augment
        names = images.keypoint_names
        augment = Augment(chosen, self.config.image_size, names) if chosen and train else None
        return DetectionBatches(images, self.seed, augment, crowds=not train)

    def groups(self) -> Sequence[int] | None:
        """Whether an image is higher than wide."""
        images = self.splits.train
        return [int(height > width) for height, width in map(images.size, range(len(images)))]

    def order(self) -> Callable[[torch.Generator], Tensor] | None:
        """That of the shards, where images are in some."""
        images = self.splits.train
        return images.order if isinstance(images, StreamObjects) else None

    def test_batch_size(self) -> int:
        """Few: maps and masks of an image in full size take much more memory than a classifier's."""
        return max(1, min(8, self.config.batch_size * 2))
