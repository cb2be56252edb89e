"""Training augmentation of images with their objects, by torchvision's transforms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from pws.training.detect.samples import Target
from pws.training.recipe import Augmentation

MEAN_COLOUR: Final = (123, 117, 104)
"""ImageNet's, which normalization makes 0."""


class Augment:
    """A transform of an image and its objects, which stay in step; objects that leave the image go.

    `flip` mirrors half of the images. `jitter` also scales them by 0.1 to 2, and crops or fills them to their size (to a
    square of `image_size` if it is given). `ssd` distorts colours, zooms out and crops around objects, and flips.

    Source: torchvision's reference settings for detection; `ssd` is Liu et al. 2016.
    """

    def __init__(self, name: Augmentation, image_size: int | None, keypoint_names: Sequence[str] = ()) -> None:
        self.name, self.image_size = name, image_size
        self.mirrored = mirrored(keypoint_names)

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        """The changed image, and the objects that are left in it."""
        moved: dict[str, Any] = {"image": tv_tensors.Image(image), "boxes": target["boxes"]}
        moved |= {"masks": target["masks"]} if "masks" in target else {}
        size = (image.shape[-2], image.shape[-1])
        if "keypoints" in target:
            moved["points"] = tv_tensors.KeyPoints(target["keypoints"][..., :2], canvas_size=size)
        flips = bool(torch.rand(()) < 0.5)
        for step in [*self._steps(size), v2.RandomHorizontalFlip(p=float(flips))]:
            moved = step(moved)
        moved["rows"] = torch.arange(len(target["labels"]))
        moved = v2.SanitizeBoundingBoxes(labels_getter=lambda sample: sample["rows"])(moved)
        return moved["image"], self._target(target, moved, flips=flips)

    def _steps(self, size: tuple[int, int]) -> list[Any]:
        if self.name == "ssd":
            zoom = v2.RandomZoomOut(fill={tv_tensors.Image: MEAN_COLOUR, "others": 0})
            return [v2.RandomPhotometricDistort(), zoom, v2.RandomIoUCrop()]
        if self.name == "jitter":
            wanted = (self.image_size, self.image_size) if self.image_size else size
            return [v2.ScaleJitter(wanted), v2.RandomCrop(wanted, pad_if_needed=True)]
        return []

    def _target(self, old: Target, moved: dict[str, Any], *, flips: bool) -> Target:
        boxes, rows = moved["boxes"], moved["rows"]
        target = {name: value[rows] for name, value in old.items() if name not in ("boxes", "masks", "keypoints")}
        sides = boxes[:, 2:] - boxes[:, :2]
        target |= {"boxes": boxes, "area": (sides[:, 0] * sides[:, 1]).as_subclass(Tensor)}
        if "masks" in moved:
            target |= {"masks": moved["masks"], "area": moved["masks"].as_subclass(Tensor).sum((1, 2)).float()}
        if "points" in moved:
            points, (height, width) = moved["points"].as_subclass(Tensor)[rows], moved["image"].shape[-2:]
            inside = (points >= 0).all(-1) & (points[..., 0] < width) & (points[..., 1] < height)
            # What left the image is not labelled.
            found = torch.cat([points, (old["keypoints"][rows][..., 2] * inside)[..., None]], -1)
            target["keypoints"] = found[:, self.mirrored] if flips else found
        return target


def mirrored(names: Sequence[str]) -> list[int]:
    """Which keypoint takes the place of each in a mirror: left_ and right_ change sides."""
    other = {"left": "right", "right": "left"}

    def partner(name: str) -> str:
        side, _, rest = name.partition("_")
        return f"{other[side]}_{rest}" if side in other else name

    return [names.index(partner(name)) if partner(name) in names else number for number, name in enumerate(names)]
