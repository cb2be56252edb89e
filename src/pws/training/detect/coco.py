"""Detection data in COCO's JSON: boxes, masks (polygons, run lengths), crowds and keypoints, checked when they are read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from faster_coco_eval.core import mask as run_lengths
from torch import Tensor
from torchvision import tv_tensors

from pws._errors import PwsError, one_line, shown
from pws.training.detect.samples import Target, target_of
from pws.training.images import read_image

LISTS: Final = ("images", "annotations", "categories")
ROUNDING: Final = 1.0
"""Pixels by which a box may stick out of its image; the rest is cut off."""


@dataclass(frozen=True)
class _Object:
    annotation: int
    box: tuple[float, float, float, float]
    label: int
    crowd: int
    area: float
    mask: Any
    keypoints: list[float]


@dataclass(frozen=True)
class _File:
    name: str
    height: int
    width: int


class CocoImages:
    """Images of one JSON file, in the order of the file.

    Raises:
        PwsError: the file is not COCO's JSON, or an image or object in it is wrong: file and object are named.
    """

    def __init__(self, annotations: Path, images: Path) -> None:
        self.annotations, self.folder = annotations, images
        content = _content(annotations)
        categories = _by_id(content["categories"], "category", annotations)
        self.classes = [str(categories[key].get("name", key)) for key in sorted(categories)]
        """In the order of the ids."""
        self._labels = {key: label for label, key in enumerate(sorted(categories), 1)}
        self.keypoint_names = next(
            (list(map(str, c["keypoints"])) for c in categories.values() if c.get("keypoints")), []
        )
        self._files = [self._file(key, entry) for key, entry in _by_id(content["images"], "image", annotations).items()]
        numbers = {key: number for number, key in enumerate(entry["id"] for entry in content["images"])}
        self._objects: list[list[_Object]] = [[] for _ in self._files]
        for key, entry in _by_id(content["annotations"], "annotation", annotations).items():
            if entry.get("image_id") not in numbers:
                raise self._wrong(key, f"its image_id {shown(entry.get('image_id'))} is that of no image")
            number = numbers[entry["image_id"]]
            self._objects[number].append(self._object(key, entry, self._files[number]))
        found = [thing for objects in self._objects for thing in objects]
        self.has_masks = bool(found) and all(thing.mask is not None for thing in found)
        self.numbers: list[int] = list(range(len(self._files)))
        """The images that are used."""

    def __len__(self) -> int:
        return len(self.numbers)

    def size(self, number: int) -> tuple[int, int]:
        """Height and width in pixels, as the JSON has them."""
        file = self._files[self.numbers[number]]
        return file.height, file.width

    def name(self, number: int) -> str:
        """The image's file."""
        return str(self.folder / self._files[self.numbers[number]].name)

    def get(self, number: int) -> tuple[Tensor, Target]:
        """Pixels and objects of an image."""
        file, objects = self._files[self.numbers[number]], self._objects[self.numbers[number]]
        pixels = read_image(self.folder / file.name)
        if tuple(pixels.shape[1:]) != (file.height, file.width):
            raise PwsError(
                f"{self.folder / file.name} has {pixels.shape[2]} x {pixels.shape[1]} pixels, and {self.annotations} says "
                f"{file.width} x {file.height}. The boxes are of another image: get both again."
            )
        target = target_of(
            [thing.box for thing in objects], [thing.label for thing in objects], (file.height, file.width)
        )
        target["iscrowd"] = torch.tensor([thing.crowd for thing in objects], dtype=torch.int64)
        target["area"] = torch.tensor([thing.area for thing in objects], dtype=torch.float32)
        if self.has_masks:
            masks = [torch.from_numpy(_decoded(thing.mask, file)).bool() for thing in objects]
            stacked = torch.stack(masks) if masks else torch.zeros(0, file.height, file.width)
            target["masks"] = tv_tensors.Mask(stacked.to(torch.uint8))
        if self.keypoint_names:
            points = torch.tensor([thing.keypoints for thing in objects], dtype=torch.float32)
            target["keypoints"] = points.reshape(-1, len(self.keypoint_names), 3)
        return pixels, target

    def _file(self, key: Any, entry: Mapping[str, Any]) -> _File:
        name: Any = entry.get("file_name")
        height: Any = entry.get("height")
        width: Any = entry.get("width")
        if not isinstance(name, str) or not _is_count(height) or not _is_count(width):
            raise PwsError(
                f"{self.annotations}: an image has file_name, height and width; image {key} has {shown(name)}, "
                f"{shown(height)}, {shown(width)}. Mend it, or remove the image."
            )
        if not (self.folder / name).is_file():
            raise PwsError(
                f"{self.annotations}: the file of image {key}, {self.folder / name}, does not exist. Put the images there, or "
                "point --data.root at the folder that holds annotations and images."
            )
        return _File(name, int(height), int(width))

    def _object(self, key: Any, entry: Mapping[str, Any], file: _File) -> _Object:
        label = self._labels.get(entry.get("category_id"))
        if label is None:
            raise self._wrong(key, f"its category_id {shown(entry.get('category_id'))} is that of no category", file)
        box, mask = self._box(key, entry, file), entry.get("segmentation")
        if mask is not None:
            self._check_mask(key, mask, file)
        count = len(self.keypoint_names)
        points = entry.get("keypoints", [0.0] * 3 * count)
        if count and not (_are_numbers(points) and len(points) == 3 * count):
            raise self._wrong(key, f"it must have x, y and visibility of {count} keypoints; got {shown(points)}", file)
        area = entry.get("area", (box[2] - box[0]) * (box[3] - box[1]))
        if not _are_numbers([area]) or area < 0:
            raise self._wrong(key, f"its area must be a number; got {shown(area)}", file)
        crowd = int(bool(entry.get("iscrowd", 0)))
        return _Object(key, box, label, crowd, float(area), mask, list(map(float, points)) if count else [])

    def _box(self, key: Any, entry: Mapping[str, Any], file: _File) -> tuple[float, float, float, float]:
        given: Any = entry.get("bbox")
        if not _are_numbers(given) or len(given) != 4 or given[2] <= 0 or given[3] <= 0:
            raise self._wrong(key, f"its bbox must be left, top, width and height above 0; got {shown(given)}", file)
        left, top, right, bottom = given[0], given[1], given[0] + given[2], given[1] + given[3]
        inside = max(0.0, left), max(0.0, top), min(float(file.width), right), min(float(file.height), bottom)
        beyond = max(-left, -top, right - file.width, bottom - file.height)
        if beyond > ROUNDING or inside[2] <= inside[0] or inside[3] <= inside[1]:
            raise self._wrong(key, f"its bbox {given} leaves the image of {file.width} x {file.height} pixels", file)
        return inside

    def _check_mask(self, key: Any, mask: Any, file: _File) -> None:
        polygons = isinstance(mask, list) and bool(mask)
        if polygons and all(_are_numbers(part) and len(part) >= 6 and len(part) % 2 == 0 for part in mask):
            return
        if isinstance(mask, dict) and list(mask.get("size", [])) == [file.height, file.width]:
            counts: Any = mask.get("counts")
            if isinstance(counts, str) or (_are_numbers(counts) and sum(counts) == file.height * file.width):
                return
        raise self._wrong(
            key,
            f"its segmentation must be polygons of 3 points or more, or run lengths of the image's size ({file.height} rows, "
            f"{file.width} columns); got {shown(mask)}",
            file,
        )

    def _wrong(self, key: Any, what: str, file: _File | None = None) -> PwsError:
        where = "" if file is None else f" of {file.name}"
        return PwsError(f"{self.annotations}: annotation {key}{where}: {what}. Mend the annotation, or remove it.")


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise PwsError(
            f"{path} does not exist. Point --data.root at the folder that holds annotations and images."
        ) from None
    except (ValueError, RecursionError) as error:
        raise PwsError(f"{path} is not JSON: {one_line(error)}. Get the file again.") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in LISTS):
        raise PwsError(f"{path} must hold COCO's lists {', '.join(LISTS)}; got {shown(content)}.")
    return content


def _by_id(entries: list[Any], what: str, path: Path) -> dict[Any, Mapping[str, Any]]:
    found: dict[Any, Mapping[str, Any]] = {}
    for entry in entries:
        key = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(key, int | str) or key in found:
            said = "occurs twice" if isinstance(key, int | str) else f"is missing in {shown(entry)}"
            raise PwsError(f"{path}: each {what} has an id of its own; {shown(key)} {said}. Mend the file.")
        found[key] = entry
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values
    )


def _decoded(mask: Any, file: _File) -> Any:
    if isinstance(mask, dict) and isinstance(mask["counts"], str):
        encoded: Any = {"size": mask["size"], "counts": mask["counts"].encode()}
    else:
        parts = run_lengths.frPyObjects(mask, file.height, file.width)
        encoded = run_lengths.merge(parts) if isinstance(parts, list) else parts
    return run_lengths.decode(encoded)
