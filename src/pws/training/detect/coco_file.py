"""COCO's JSON, read once and checked whole: classes, images, and the objects of each."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pws._errors import PwsError, one_line, shown
from pws.training.detect.coco_masks import Shape, checked_shape
from pws.training.detect.faults import Box, FaultError, box_inside, is_number, naming, numbers

Record = dict[str, Any]
LONGEST: Final = 2**16
"""Pixels of an image's side."""
BOX_FORM: Final = "COCO's bbox is [left, top, width, height]."


@dataclass(frozen=True, slots=True)
class CocoObject:
    """An annotation."""

    label: int
    box: Box
    crowd: int
    area: float
    """0 if the file gives none."""
    shape: Shape | None
    """What the mask is decoded from."""
    keypoints: list[float] | None
    """x, y and visibility of each."""


@dataclass(frozen=True, slots=True)
class CocoImage:
    """An image and its objects, in the file's order."""

    name: str
    height: int
    width: int
    objects: list[CocoObject] = field(default_factory=list)


@dataclass(frozen=True)
class CocoFile:
    """All that the JSON holds."""

    classes: list[str]
    keypoints: list[str]
    """Their names; none if no category has any."""
    images: list[CocoImage]
    has_masks: bool


def read_coco(path: Path) -> CocoFile:
    """Read and check.

    Raises:
        PwsError: it is not COCO's JSON, or an entry is wrong: the message names it.
    """
    content = _json(path)
    categories = _records(path, content, "categories")
    if not categories:
        raise PwsError(f"{path} names no categories, so there is no class to find. Add them.")
    classes, keypoints = _classes(path, categories)
    images = {key: _image(path, record) for key, record in _records(path, content, "images").items()}
    if not images:
        raise PwsError(f"{path} names no images: nothing can be trained or tested on it. Add them.")
    annotations = _records(path, content, "annotations")
    has_masks = any(record.get("segmentation") for record in annotations.values())
    labels = {key: number for number, key in enumerate(sorted(categories), 1)}
    for key, record in annotations.items():
        with naming(path, f"annotation {key!r}"):
            image = _listed(images, record, "image_id", "images")
            label = _listed(labels, record, "category_id", "categories")
            if not _is_nothing(record):
                image.objects.append(_object(record, image, label, len(keypoints), has_masks))
    return CocoFile(classes, keypoints, list(images.values()), has_masks)


def _json(path: Path) -> Record:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise PwsError(f"cannot read {path} as COCO's JSON: {one_line(error)}. Get it again.") from error
    if not isinstance(content, dict):
        raise PwsError(
            f"{path} must hold COCO's JSON, an object with images, annotations and categories; it is another."
        )
    return content


def _records(path: Path, content: Record, key: str) -> dict[Any, Record]:
    """The entries of a list by their ids."""
    entries = content.get(key)
    if not isinstance(entries, list):
        raise PwsError(f"{path} is not COCO's JSON: it needs a list {key!r}; got {shown(entries)}. Is it another file?")
    found: dict[Any, Record] = {}
    # Categories are put in the order of their ids, so those are numbers.
    kinds = (int,) if key == "categories" else (int, str)
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or type(entry.get("id")) not in kinds:
            raise PwsError(f"{path}: entry {number} of {key} must be an object with an id; got {shown(entry)}.")
        if entry["id"] in found:
            raise PwsError(f"{path}: the id {entry['id']!r} occurs twice in {key}. Give each entry an id of its own.")
        found[entry["id"]] = entry
    return found


def _classes(path: Path, categories: dict[int, Record]) -> tuple[list[str], list[str]]:
    """The names in the order of the ids, and those of the keypoints."""
    classes: list[str] = []
    keypoints: list[str] = []
    for key, record in sorted(categories.items()):
        with naming(path, f"category {key}"):
            name, points = record.get("name"), record.get("keypoints") or []
            if not isinstance(name, str) or not name or name in classes:
                raise FaultError(f"needs a name of its own; got {shown(name)}.")
            if not isinstance(points, list) or not all(isinstance(point, str) for point in points):
                raise FaultError(f"needs a list of names as its keypoints; got {shown(points)}.")
            if points and keypoints not in ([], points):
                raise FaultError(
                    f"has the keypoints {shown(points)}, another category {shown(keypoints)}. They must agree."
                )
            classes.append(name)
            keypoints = points or keypoints
    return classes, keypoints


def _image(path: Path, record: Record) -> CocoImage:
    name, height, width = (record.get(key) for key in ("file_name", "height", "width"))
    with naming(path, f"image {record['id']!r} ({shown(name)})"):
        if not isinstance(name, str) or not name or "\0" in name:
            raise FaultError("needs a file_name.")
        if not (type(height) is int and type(width) is int and 1 <= height <= LONGEST and 1 <= width <= LONGEST):
            raise FaultError(f"needs its height and width in pixels; got {shown(height)} and {shown(width)}.")
    return CocoImage(name, height, width)


def _listed(known: dict[Any, Any], record: Record, key: str, where: str) -> Any:
    """What the annotation refers to."""
    value = record.get(key)
    if type(value) not in (int, str) or value not in known:
        raise FaultError(f"has the {key} {shown(value)}, and {where} has none of this id. Mend or remove it.")
    return known[value]


def _is_nothing(record: Record) -> bool:
    """Whether the file itself says that this covers no pixel: COCO's own train2017 has two such annotations."""
    box = record.get("bbox")
    flat = isinstance(box, list) and len(box) == 4 and all(map(is_number, box)) and 0 in box[2:]
    return flat and is_number(record.get("area")) and record["area"] == 0


def _object(record: Record, image: CocoImage, label: int, keypoints: int, has_masks: bool) -> CocoObject:
    left, top, width, height = numbers(record.get("bbox"), 4, "a bbox")
    box = box_inside((left, top, left + width, top + height), image.height, image.width, BOX_FORM)
    crowd, area = record.get("iscrowd", 0), record.get("area", 0)
    if crowd not in (0, 1):
        raise FaultError(f"has iscrowd {shown(crowd)}; it must be 0 or 1.")
    if not is_number(area) or area < 0:
        raise FaultError(f"has the area {shown(area)}; it must be a number of pixels, or left out.")
    shape = checked_shape(record.get("segmentation"), image.height, image.width) if has_masks else None
    points = _points(record.get("keypoints"), keypoints) if keypoints else None
    return CocoObject(label, box, int(crowd), float(area), shape, points)


def _points(values: Any, count: int) -> list[float]:
    if values is None or values == []:
        return [0.0] * (3 * count)
    points = numbers(values, 3 * count, f"keypoints ({count} times x, y, visibility)")
    if not set(points[2::3]) <= {0.0, 1.0, 2.0}:
        raise FaultError(
            f"has the visibilities {shown(points[2::3])}; each must be 0 (not labelled), 1 (hidden) or 2 (visible)."
        )
    return points
