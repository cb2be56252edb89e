"""Images with COCO's annotations: JSON beside a folder of images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torchvision import tv_tensors

from pws._errors import PwsError
from pws.training.detect.coco_file import CocoImage, read_coco
from pws.training.detect.coco_masks import mask_of
from pws.training.detect.samples import Target, areas, read_sized, target_of


class CocoImages:
    """The images of one JSON file; the masks of an image are decoded when it is asked for.

    Args:
        annotations: the JSON file. It is checked whole, and the image files are looked for.
        images: the folder of the images.

    Raises:
        PwsError: an entry is wrong, or an image is missing: the message names the file and the object.
    """

    def __init__(self, annotations: Path, images: Path) -> None:
        content = read_coco(annotations)
        self.annotations, self.folder, self.images = annotations, images, content.images
        self.classes, self.has_masks, self.keypoint_names = content.classes, content.has_masks, content.keypoints
        self.numbers = list(range(len(self.images)))
        missing = [image.name for image in self.images if not (images / image.name).is_file()]
        if missing:
            raise PwsError(
                f"{annotations} names {len(missing)} images that are not in {images}; the first is {missing[0]}. Put them "
                "there, or use the file's own images."
            )

    def __len__(self) -> int:
        return len(self.numbers)

    def size(self, number: int) -> tuple[int, int]:
        """Height and width, as the JSON gives them."""
        image = self.images[self.numbers[number]]
        return image.height, image.width

    def name(self, number: int) -> str:
        """The image's file."""
        return str(self.folder / self.images[self.numbers[number]].name)

    def get(self, number: int) -> tuple[Tensor, Target]:
        """The pixels and the objects."""
        pixels = read_sized(Path(self.name(number)), self.size(number), self.annotations)
        image = self.images[self.numbers[number]]
        return pixels, coco_target(image, has_masks=self.has_masks, keypoints=len(self.keypoint_names))


def coco_target(image: CocoImage, *, has_masks: bool, keypoints: int) -> Target:
    """The objects of an image whose data has masks, and so many keypoints of each object."""
    objects = image.objects
    target = target_of([o.box for o in objects], [o.label for o in objects], (image.height, image.width))
    target["iscrowd"] = torch.tensor([o.crowd for o in objects], dtype=torch.int64)
    if has_masks:
        target["masks"] = tv_tensors.Mask(_masks(image))
    given = torch.tensor([o.area for o in objects])
    target["area"] = torch.where(given > 0, given, areas(target["boxes"], target.get("masks")))
    if keypoints:
        target["keypoints"] = torch.tensor([o.keypoints for o in objects]).reshape(-1, keypoints, 3)
    return target


def _masks(image: CocoImage) -> Tensor:
    shapes = [o.shape for o in image.objects if o.shape is not None]
    none = torch.zeros(0, image.height, image.width, dtype=torch.uint8)
    return torch.stack([mask_of(s, image.height, image.width) for s in shapes]) if shapes else none
