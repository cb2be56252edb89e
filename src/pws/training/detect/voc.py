"""Detection data in Pascal VOC's layout: an XML file for each image, boxes alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

import torch
from torch import Tensor

from pws._errors import PwsError, one_line, shown
from pws.training.detect.samples import Target, target_of
from pws.training.images import read_image

CLASSES: Final = (
    *(
        "aeroplane",
        "bicycle",
        "bird",
        "boat",
        "bottle",
        "bus",
        "car",
        "cat",
        "chair",
        "cow",
        "diningtable",
        "dog",
        "horse",
    ),
    *("motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


@dataclass(frozen=True)
class _Image:
    path: Path
    size: tuple[int, int]
    boxes: list[tuple[float, float, float, float]]
    labels: list[int]
    difficult: list[bool]


class VocImages:
    """The images of a split of one or several years: `FOLDER/ImageSets/Main/SPLIT.txt`, `Annotations`, `JPEGImages`.

    VOC's pixels count from 1, and a box holds both of its corners' pixels: left and top lose 1.

    Raises:
        PwsError: a file is missing or no annotation of VOC's; file and object are named.
    """

    has_masks = False

    def __init__(self, parts: list[tuple[Path, str]]) -> None:
        self.classes, self.keypoint_names = list(CLASSES), list[str]()
        self._images = [_read(folder, name) for folder, split in parts for name in _names(folder, split)]
        self.numbers = list(range(len(self._images)))

    def __len__(self) -> int:
        return len(self.numbers)

    def size(self, number: int) -> tuple[int, int]:
        """Height and width in pixels, as the XML has them."""
        return self._images[self.numbers[number]].size

    def name(self, number: int) -> str:
        """The image's file."""
        return str(self._images[self.numbers[number]].path)

    def get(self, number: int) -> tuple[Tensor, Target]:
        """Pixels and objects of an image."""
        image = self._images[self.numbers[number]]
        pixels = read_image(image.path)
        if tuple(pixels.shape[1:]) != image.size:
            raise PwsError(
                f"{image.path} has {pixels.shape[2]} x {pixels.shape[1]} pixels, and its annotation says {image.size[1]} x "
                f"{image.size[0]}. The boxes are of another image: get both again."
            )
        target = target_of(image.boxes, image.labels, image.size)
        target["difficult"] = torch.tensor(image.difficult, dtype=torch.bool)
        return pixels, target


def _names(folder: Path, split: str) -> list[str]:
    path = folder / "ImageSets" / "Main" / f"{split}.txt"
    if not path.is_file():
        raise PwsError(f"{path} does not exist. Point --data.root at the folder that holds VOC2007 and VOC2012.")
    return path.read_text(encoding="utf-8", errors="replace").split()


def _read(folder: Path, name: str) -> _Image:
    path, image = folder / "Annotations" / f"{name}.xml", folder / "JPEGImages" / f"{name}.jpg"
    for file in (path, image):
        if not file.is_file():
            raise PwsError(
                f"{file} does not exist, and a split of {folder} names it. Get the file, or take {name} out."
            )
    text = path.read_bytes()
    if b"<!DOCTYPE" in text:  # it may define entities, which grow without end
        raise PwsError(f"{path} must be plain XML; it has a DOCTYPE. Get the file again.")
    try:
        tree = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise PwsError(f"{path} is not XML: {one_line(error)}. Get the file again.") from error
    size = tuple(int(_number(path, "size", tree, f"size/{side}")) for side in ("height", "width"))
    objects = [_object(path, number, node, size) for number, node in enumerate(tree.iter("object"), 1)]
    boxes, labels, difficult = ([item[part] for item in objects] for part in range(3))
    return _Image(image, (size[0], size[1]), boxes, labels, difficult)  # type: ignore[arg-type]


def _object(
    path: Path, number: int, node: ElementTree.Element, size: tuple[int, ...]
) -> tuple[tuple[float, ...], int, bool]:
    name, which = (node.findtext("name") or "").strip(), f"object {number}"
    if name not in CLASSES:
        raise PwsError(
            f"{path}, {which}: its name must be one of VOC's classes; got {shown(name)}. Valid: {', '.join(CLASSES)}"
        )
    left, top, right, bottom = (_number(path, which, node, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax"))
    box = max(0.0, left - 1), max(0.0, top - 1), min(float(size[1]), right), min(float(size[0]), bottom)
    if box[2] <= box[0] or box[3] <= box[1]:
        raise PwsError(
            f"{path}, {which} ({name}): its box must have a width and a height inside the image of {size[1]} x {size[0]} "
            f"pixels; got {left:g}, {top:g}, {right:g}, {bottom:g}. Mend the object, or remove it."
        )
    return box, CLASSES.index(name) + 1, (node.findtext("difficult") or "0").strip() == "1"


def _number(path: Path, which: str, node: ElementTree.Element, tag: str) -> float:
    text = node.findtext(tag)
    try:
        value = float(text or "")
    except ValueError:
        value = float("nan")
    if not 0 <= value < 1e6:
        raise PwsError(f"{path}, {which}: {tag} must be a number, at least 0; got {shown(text)}. Mend it.")
    return value
