"""Training augmentation: images moved together with their boxes, masks and keypoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from pws._errors import UnknownNameError
from pws.training.detect.samples import Target, areas

FILL: Final = {tv_tensors.Image: (124, 116, 104), "others": 0}
"""Around an image that was made smaller: ImageNet's mean, as in torchvision's presets."""
Sample = tuple[Tensor, Target]


def augmentation(
    name: str, image_size: int | None, flip_pairs: Sequence[tuple[int, int]] = ()
) -> Callable[[Tensor, Target], Sample]:
    """The augmentation of that name; each of them ends with a flip of every second image.

    Args:
        name: flip; jitter (large-scale jitter: scaled by 0.1 to 2, then cropped or padded); or ssd (photometric distortion,
            zoom out, and a crop that keeps a part of some object).
        image_size: side of the square that jitter gives; the image's own size if left out.
        flip_pairs: keypoints that a flip swaps.

    Raises:
        UnknownNameError: no such augmentation.
    """
    if name not in AUGMENTATIONS:
        raise UnknownNameError("augmentation", name, AUGMENTATIONS)
    return Augmentation(name, image_size, tuple(flip_pairs))


@dataclass(frozen=True)
class Augmentation:
    """What is drawn comes from torch's generator; it can be sent to loader processes."""

    name: str
    image_size: int | None
    flip_pairs: tuple[tuple[int, int], ...]

    def __call__(self, image: Tensor, target: Target) -> Sample:
        """The augmented image and the objects that are left in it."""
        sample: Sample = (tv_tensors.Image(image), _with_points(target))
        for transform in AUGMENTATIONS[self.name](self.image_size, (image.shape[-2], image.shape[-1])):
            sample = transform(*sample)
        if self.name != "flip":
            sample = sample[0], _left(sample[1])
        if torch.rand(()) < 0.5:
            sample = self._flipped(*sample)
        return sample[0].as_subclass(Tensor), _finished(sample[1], target)

    def _flipped(self, image: Tensor, target: Target) -> Sample:
        moved = {key: TF.horizontal_flip(v) if isinstance(v, tv_tensors.TVTensor) else v for key, v in target.items()}
        if "keypoints" in target:
            order = list(range(target["keypoints"].shape[1]))
            for left, right in self.flip_pairs:
                order[left], order[right] = right, left
            for key in ("keypoints", "visibility"):
                moved[key] = tv_tensors.wrap(moved[key].as_subclass(Tensor)[:, order], like=moved[key])
        return TF.horizontal_flip(image), moved


def _scale_jitter(side: int | None, own: tuple[int, int]) -> list[v2.Transform]:
    size = (side, side) if side else own
    return [v2.ScaleJitter((size[1], size[0])), v2.RandomCrop(size, pad_if_needed=True, fill=FILL)]


def _ssd(_: int | None, __: tuple[int, int]) -> list[v2.Transform]:
    return [v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=FILL), v2.RandomIoUCrop()]


AUGMENTATIONS: Final[dict[str, Callable[[int | None, tuple[int, int]], list[v2.Transform]]]] = {
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
