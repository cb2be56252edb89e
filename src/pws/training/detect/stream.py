"""Images with their objects in shards, as `pws pack` writes them from COCO's files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pws._errors import PwsError, one_line
from pws.training.detect.coco import coco_target
from pws.training.detect.coco_file import CocoImage, CocoObject
from pws.training.detect.samples import Target, sized
from pws.training.images import decode_image
from pws.training.shards import COPY_AGAIN, ObjectsIndex
from pws.training.stream import PackedFolder, PackedPart


def write_objects(objects: Sequence[CocoObject]) -> bytes:
    """The checked objects of an image as JSON, a record of `CocoObject`'s fields each."""
    return json.dumps([asdict(one) for one in objects], default=_plain).encode()


def _plain(value: Any) -> Any:
    """A polygon's coordinates, or the bytes of an RLE."""
    return value.tolist() if isinstance(value, np.ndarray) else value.decode()


def read_objects(text: bytes) -> list[CocoObject]:
    """What `write_objects` wrote."""
    return [_object(**record) for record in json.loads(text)]


def _object(*, box: list[float], shape: Any, **values: Any) -> CocoObject:
    polygons = [np.array(polygon, np.float64) for polygon in shape] if isinstance(shape, list) else shape
    left, top, right, bottom = box
    return CocoObject(box=(left, top, right, bottom), shape=polygons, **values)


class StreamObjects:
    """The images of one part of a packed dataset, each with its objects.

    Raises:
        PwsError: the images were packed for another task.
    """

    def __init__(self, packed: PackedFolder, part: str) -> None:
        about = packed.about(ObjectsIndex)
        self.classes, self.has_masks, self.keypoint_names = about.classes, about.masks[part], about.keypoints[part]
        self.stored, self.sizes = PackedPart(packed, part), packed.index.sizes[part]
        self.numbers = list(range(len(self.stored)))

    def __len__(self) -> int:
        return len(self.numbers)

    def size(self, number: int) -> tuple[int, int]:
        """Height and width, as pws.json gives them."""
        return self.sizes[self.numbers[number]]

    def name(self, number: int) -> str:
        """What the file was called when it was packed."""
        return self.stored.name(self.numbers[number])

    def order(self, generator: torch.Generator) -> Tensor:
        """The images, in an order that goes through the shards."""
        return self.stored.order(self.numbers, generator)

    def get(self, number: int) -> tuple[Tensor, Target]:
        """The pixels and the objects."""
        data, text, stored_name = self.stored.item(self.numbers[number])
        size, name, source = self.size(number), bytes(stored_name).decode(), self.stored.packed.where
        pixels = sized(decode_image(bytes(data), name), size, name, source)
        try:
            image = CocoImage(name, *size, read_objects(bytes(text)))
        except (TypeError, ValueError) as error:
            raise PwsError(f"{source}: the objects of {name} are damaged ({one_line(error)}). {COPY_AGAIN}") from error
        return pixels, coco_target(image, has_masks=self.has_masks, keypoints=len(self.keypoint_names))
