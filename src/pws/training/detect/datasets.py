"""The detection datasets: where their files are looked for."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Final

from pws._errors import PwsError, UnknownNameError
from pws.training.datasets import chosen_images
from pws.training.detect.coco import CocoImages
from pws.training.detect.drawn import DrawnImages, digit_cutouts
from pws.training.detect.samples import DetectionImages, DetectionSplits
from pws.training.detect.stream import StreamObjects
from pws.training.detect.voc import VocImages
from pws.training.recipe import DataConfig
from pws.training.stream import open_packed

Layout = tuple[tuple[str, str], tuple[str, str]]
"""Names below annotations/ and of the image folders, of training and test images."""
OURS: Final[Layout] = (("train", "train"), ("test", "test"))
DIGIT_SCENES: Final = (200, 50)
"""Training and test images."""
DIGIT_SIZE: Final = 96

Parts = tuple[DetectionImages, DetectionImages]


def load_detection_splits(config: DataConfig, seed: int) -> DetectionSplits:
    """The dataset that `config` names.

    Raises:
        UnknownNameError: no such dataset.
        PwsError: files are missing or wrong, with where they were looked for.
    """
    if config.name not in DETECTION_DATASETS:
        raise UnknownNameError("dataset of task detect", config.name, DETECTION_DATASETS)
    train, test = DETECTION_DATASETS[config.name](config.root)
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes)) or "none, but their order differs"
        raise PwsError(
            f"{config.name} in {config.root}: the training and the test images must have the same classes; in one only: {odd}."
        )
    chosen, held_out = chosen_images(config, len(train), seed)
    validation = _some(train, held_out) if held_out else None
    return DetectionSplits(train if chosen is None else _some(train, chosen), validation, test, train.classes)


def _some(images: DetectionImages, numbers: list[int]) -> DetectionImages:
    some = copy(images)
    some.numbers = [images.numbers[number] for number in numbers]
    return some


def _coco(kind: str) -> Callable[[str], Parts]:
    layouts: list[Layout] = [((f"{kind}_train2017", "train2017"), (f"{kind}_val2017", "val2017")), OURS]

    def load(given: str) -> Parts:
        root = Path(given)
        for layout in layouts:
            if all((root / "annotations" / f"{name}.json").is_file() for name, _ in layout):
                return _both(root, layout)
        looked = " or ".join(f"{train[0]}.json and {test[0]}.json" for train, test in layouts)
        raise PwsError(
            f"coco: {root / 'annotations'} must hold {looked}, beside folders of images; it holds neither pair. Get COCO from "
            "cocodataset.org, or point --data.root at your own data of this layout."
        )

    return load


def _both(root: Path, layout: Layout) -> Parts:
    train, test = (CocoImages(root / "annotations" / f"{name}.json", root / images) for name, images in layout)
    return train, test


def _scenes(given: str) -> Parts:
    root = Path(given)
    for folder in (root, root / "scenes"):
        if (folder / "annotations" / "train.json").is_file():
            return _both(folder, OURS)
    raise PwsError(
        f"scenes: neither {root} nor {root / 'scenes'} holds annotations/train.json. Make the scenes: pws scenes "
        f"{root / 'scenes'}, or point --data.root at their folder."
    )


def _voc(given: str) -> Parts:
    root = Path(given)
    for folder in (root, root / "VOCdevkit"):
        years = [year for year in (folder / "VOC2007", folder / "VOC2012") if year.is_dir()]
        if years and years[0].name == "VOC2007":
            return VocImages([(year, "trainval") for year in years]), VocImages([(years[0], "test")])
        if years:  # the test images of 2012 have no public boxes
            return VocImages([(years[0], "train")]), VocImages([(years[0], "val")])
    raise PwsError(
        f"voc: {root} holds neither VOC2007 nor VOC2012, the folders of the archives of host.robots.ox.ac.uk/pascal/VOC. "
        "Unpack them there (2007's test images too), or point --data.root at the folder that holds them."
    )


def _digit_scenes(_: str) -> Parts:
    parts = enumerate(zip(digit_cutouts(), DIGIT_SCENES, strict=True))
    train, test = (DrawnImages(cutouts, DIGIT_SIZE, part, count) for part, (cutouts, count) in parts)
    return train, test


def _stream(root: str) -> Parts:
    packed = open_packed(root)
    return StreamObjects(packed, "train"), StreamObjects(packed, "test")


DETECTION_DATASETS: Final[dict[str, Callable[[str], Parts]]] = {
    "digit-scenes": _digit_scenes,
    "scenes": _scenes,
    "coco": _coco("instances"),
    "coco-keypoints": _coco("person_keypoints"),
    "voc": _voc,
    "stream": _stream,
}
"""Name to loader, which takes data.root."""
