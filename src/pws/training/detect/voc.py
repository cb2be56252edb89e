"""Images with Pascal VOC's annotations: an XML file beside each image, boxes alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

import torch
from torch import Tensor

from pws._errors import PwsError, one_line, shown
from pws.training.detect.faults import LARGEST, Box, FaultError, box_inside, naming
from pws.training.detect.samples import Target, read_sized, target_of

CLASSES: Final = [
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
]
BOX_FORM: Final = "VOC's xmin, ymin, xmax, ymax count pixels from 1."


@dataclass(frozen=True, slots=True)
class _Object:
    label: int
    box: Box
    difficult: bool


@dataclass(frozen=True, slots=True)
class _Image:
    file: Path
    annotation: Path
    height: int
    width: int
    objects: list[_Object]


class VocImages:
    """The images of one or more splits, with boxes and no masks.

    Args:
        folders: folders as VOC2007, each with the name of a list in its ImageSets/Main, such as trainval.

    Raises:
        PwsError: a file is missing, or an entry is wrong: the message names the file and the object.
    """

    has_masks = False

    def __init__(self, folders: list[tuple[Path, str]]) -> None:
        self.classes, self.keypoint_names = CLASSES, list[str]()
        self.images = [_read(folder, name) for folder, split in folders for name in _names(folder, split)]
        self.numbers = list(range(len(self.images)))

    def __len__(self) -> int:
        return len(self.numbers)

    def size(self, number: int) -> tuple[int, int]:
        """Height and width, as the XML gives them."""
        image = self.images[self.numbers[number]]
        return image.height, image.width

    def name(self, number: int) -> str:
        """The image's file."""
        return str(self.images[self.numbers[number]].file)

    def get(self, number: int) -> tuple[Tensor, Target]:
        """The pixels and the objects."""
        image, size = self.images[self.numbers[number]], self.size(number)
        target = target_of([o.box for o in image.objects], [o.label for o in image.objects], size)
        target["difficult"] = torch.tensor([o.difficult for o in image.objects], dtype=torch.bool)
        return read_sized(image.file, size, image.annotation), target


def _names(folder: Path, split: str) -> list[str]:
    path = folder / "ImageSets" / "Main" / f"{split}.txt"
    try:
        names = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise PwsError(f"cannot read VOC's list of images {path}: {one_line(error)}. Get the dataset again.") from error
    if not names:
        raise PwsError(f"VOC's list of images {path} is empty. Get the dataset again.")
    return names


def _read(folder: Path, name: str) -> _Image:
    path, file = folder / "Annotations" / f"{name}.xml", folder / "JPEGImages" / f"{name}.jpg"
    root = _parsed(path)
    if not file.is_file():
        raise PwsError(f"{path} is there, and its image {file} is missing. Get the dataset again.")
    with naming(path, "the image"):
        height, width = (round(_number(root, f"size/{side}")) for side in ("height", "width"))
        if height < 1 or width < 1:
            raise FaultError(f"needs its size in pixels; got {width} x {height}.")
    objects = []
    for number, element in enumerate(root.findall("object"), 1):
        class_name = (element.findtext("name") or "").strip()
        with naming(path, f"object {number} ({shown(class_name)})"):
            objects.append(_object(element, class_name, height, width))
    return _Image(file, path, height, width, objects)


class _NoDoctype(ElementTree.TreeBuilder):
    """Builds no tree of a file that defines entities, for they may unfold to gigabytes."""

    def doctype(self, *_: str | None) -> None:
        raise FaultError("has a DOCTYPE, which annotations have no use for. Remove it.")


def _parsed(path: Path) -> ElementTree.Element:
    try:
        with naming(path, "the XML"):
            return ElementTree.fromstring(path.read_bytes(), ElementTree.XMLParser(target=_NoDoctype()))
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
        if isinstance(error, PwsError):
            raise
        raise PwsError(f"cannot read {path} as VOC's XML: {one_line(error)}. Get it again.") from error


def _object(element: ElementTree.Element, name: str, height: int, width: int) -> _Object:
    if name not in CLASSES:
        raise FaultError(
            f"is of none of VOC's classes, {', '.join(CLASSES)}. Mend the name, or write your own classes as COCO's JSON."
        )
    left, top, right, bottom = (_number(element, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
    difficult = (element.findtext("difficult") or "0").strip()
    if difficult not in ("0", "1"):
        raise FaultError(f"has the flag difficult {shown(difficult)}; it must be 0 or 1.")
    box = box_inside((left - 1, top - 1, right, bottom), height, width, BOX_FORM)
    return _Object(CLASSES.index(name) + 1, box, difficult == "1")


def _number(element: ElementTree.Element, key: str) -> float:
    text = element.findtext(key)
    try:
        value = float(text or "")
    except ValueError:
        value = LARGEST
    if not abs(value) < LARGEST:
        raise FaultError(f"needs a finite number as its {key}; got {shown(text)}. Mend or remove it.")
    return value
