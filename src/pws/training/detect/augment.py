"""Training augmentation: images moved together with their boxes, masks and keypoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from pws._errors import PwsError
from pws.training.detect.samples import Target, areas
from pws.training.recipe import Augmentation

FILL: Final = {tv_tensors.Image: (124, 116, 104), "others": 0}
"""Around an image that was made smaller: ImageNet's mean, which normalization makes 0."""
Sample = tuple[Tensor, Target]


class Augment:
    """A transform of an image and its objects, which stay in step; objects that leave the image go.

    `flip` mirrors half of the images. `jitter` also scales them by 0.1 to 2, and crops or fills them to their size (to a
    square of `image_size` if it is given). `ssd` distorts colours, zooms out and crops around objects, and flips.

    Source: torchvision's reference settings for detection; `ssd` is Liu et al. 2016.
    """

    def __init__(self, name: Augmentation, image_size: int | None, keypoint_names: Sequence[str] = ()) -> None:
        if keypoint_names and not hasattr(tv_tensors, "KeyPoints"):
            raise PwsError(
                "data.augment moves keypoints by torchvision 0.23 or newer, and this one is older. Update it (pip install -U "
                "torch torchvision), or train without data.augment."
            )
        self.name, self.image_size = name, image_size
        self.mirrored = mirrored(keypoint_names)

    def __call__(self, image: Tensor, target: Target) -> Sample:
        """The changed image, and the objects that are left in it."""
        sample: Sample = (tv_tensors.Image(image), _with_points(target))
        for transform in STEPS[self.name](self.image_size, (image.shape[-2], image.shape[-1])):
            sample = transform(*sample)
        if self.name != "flip":
            sample = sample[0], _left(sample[1])
        if torch.rand(()) < 0.5:
            sample = self._flipped(*sample)
        return sample[0], _finished(sample[1], target)

    def _flipped(self, image: Tensor, target: Target) -> Sample:
        moved = {key: TF.horizontal_flip(v) if isinstance(v, tv_tensors.TVTensor) else v for key, v in target.items()}
        for key in ("keypoints", "visibility") if "keypoints" in target else ():
            moved[key] = tv_tensors.wrap(moved[key].as_subclass(Tensor)[:, self.mirrored], like=moved[key])
        return TF.horizontal_flip(image), moved


def mirrored(names: Sequence[str]) -> list[int]:
    """Which keypoint takes the place of each in a mirror: left_ and right_ change sides."""
    other = {"left": "right", "right": "left"}

    def partner(name: str) -> str:
        side, _, rest = name.partition("_")
        return f"{other[side]}_{rest}" if side in other else name

    return [names.index(partner(name)) if partner(name) in names else number for number, name in enumerate(names)]


def _scale_jitter(side: int | None, own: tuple[int, int]) -> list[v2.Transform]:
    size = (side, side) if side else own
    return [v2.ScaleJitter((size[1], size[0])), v2.RandomCrop(size, pad_if_needed=True, fill=FILL)]


def _ssd(_: int | None, __: tuple[int, int]) -> list[v2.Transform]:
    return [v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=FILL), v2.RandomIoUCrop()]


STEPS: Final[dict[Augmentation, Callable[[int | None, tuple[int, int]], list[v2.Transform]]]] = {
    "flip": lambda _, __: [],
    "jitter": _scale_jitter,
    "ssd": _ssd,
}
"""Name to what comes before the flip, by the side wanted and the image's own height and width."""


def _with_points(target: Target) -> Target:
    """The keypoints as torchvision's, which have no visibility; that stands beside them."""
    if "keypoints" not in target:
        return dict(target)
    points, canvas = target["keypoints"], target["boxes"].canvas_size  # type: ignore[attr-defined]
    return {
        **target,
        "keypoints": tv_tensors.KeyPoints(points[..., :2], canvas_size=canvas),
        "visibility": points[..., 2],
    }


def _left(target: Target) -> Target:
    """The objects that a crop has left, with boxes around what is left of their masks."""
    valid = TF.sanitize_bounding_boxes(target["boxes"])[1]
    if "masks" in target:
        valid &= target["masks"].as_subclass(Tensor).bool().flatten(1).any(1)
    left = {key: tv_tensors.wrap(value.as_subclass(Tensor)[valid], like=value) for key, value in target.items()}
    masks = left.get("masks")
    if masks is not None:
        boxes = masks_to_boxes(masks.as_subclass(Tensor)) + torch.tensor([0, 0, 1, 1])  # to the last pixel's far edge
        left["boxes"] = tv_tensors.wrap(boxes, like=left["boxes"])
    left["area"] = areas(left["boxes"], masks)
    return left


def _finished(target: Target, given: Target) -> Target:
    """The keys that were given; keypoints that left the image are not labelled any more."""
    if "keypoints" in given:
        points = target["keypoints"].as_subclass(Tensor)
        height, width = target["boxes"].canvas_size  # type: ignore[attr-defined]
        inside = (points >= -0.5).all(-1) & (points[..., 0] < width - 0.5) & (points[..., 1] < height - 0.5)
        labelled = torch.cat([points, target["visibility"][..., None]], -1)
        target["keypoints"] = torch.where(inside[..., None], labelled, 0.0)
    return {key: target[key] for key in given}
