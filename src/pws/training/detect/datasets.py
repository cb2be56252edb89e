"""The detection datasets: where their files are looked for, and how they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from torch import Tensor

from pws._errors import PwsError, UnknownNameError
from pws.training.datasets import chosen_images
from pws.training.detect.coco import CocoImages
from pws.training.detect.samples import DetectionImages, DetectionSplits, Target
from pws.training.detect.scene_images import SceneImages
from pws.training.detect.voc import VocImages
from pws.training.recipe import DataConfig


class _Part(DetectionImages, Protocol):
    classes: list[str]


Parts = tuple[_Part, _Part]
"""For training and for testing."""
Layout = tuple[str, str]
"""Below the root: the names of the JSON files and of the image folders, for training and for testing."""
OURS: Final = (("train", "train"), ("test", "test"))
DIGIT_SCENES: Final = (200, 50)
"""For training and for testing."""
DIGIT_SIZE: Final = 96


def load_detection_splits(config: DataConfig, seed: int) -> DetectionSplits:
    """The dataset that `config` names.

    Raises:
        UnknownNameError: no such dataset.
        PwsError: files are missing or wrong, with where they were looked for and how to get them.
    """
    if config.name not in DETECTION_DATASETS:
        raise UnknownNameError("dataset of task detect", config.name, DETECTION_DATASETS)
    train, test = DETECTION_DATASETS[config.name](Path(config.root))
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes)) or "none, but their order differs"
        raise PwsError(
            f"{config.name} in {config.root}: the training and the test images must have the same classes; in one only: {odd}."
        )
    chosen = chosen_images(config, len(train), seed)
    return DetectionSplits(train if chosen is None else SomeImages(train, chosen), test, train.classes)


@dataclass
class SomeImages:
    """The images of a dataset that have these numbers."""

    images: DetectionImages
    numbers: list[int]

    def __post_init__(self) -> None:
        self.has_masks, self.keypoints = self.images.has_masks, self.images.keypoints
        self.flip_pairs = self.images.flip_pairs

    def __len__(self) -> int:
        return len(self.numbers)

    def size(self, number: int) -> tuple[int, int]:
        """Height and width."""
        return self.images.size(self.numbers[number])

    def name(self, number: int) -> str:
        """The image's file."""
        return self.images.name(self.numbers[number])

    def get(self, number: int) -> tuple[Tensor, Target]:
        """The pixels and the objects."""
        return self.images.get(self.numbers[number])


def _coco(kind: str) -> Callable[[Path], Parts]:
    layouts = [((f"{kind}_train2017", "train2017"), (f"{kind}_val2017", "val2017")), OURS]

    def load(root: Path) -> Parts:
        for layout in layouts:
            if all((root / "annotations" / f"{name}.json").is_file() for name, _ in layout):
                return _read_coco(root, layout)
        looked = " or ".join(f"{a[0]}.json and {b[0]}.json" for a, b in layouts)
        raise PwsError(
            f"coco: {root / 'annotations'} must hold {looked}, beside folders of images; it holds neither pair. Get COCO from "
            "cocodataset.org, or point --data.root at your own data of this layout."
        )

    return load


def _read_coco(root: Path, layout: tuple[Layout, Layout]) -> Parts:
    train, test = (CocoImages(root / "annotations" / f"{name}.json", root / images) for name, images in layout)
    return train, test


def _scenes(root: Path) -> Parts:
    for folder in (root, root / "scenes"):
        if (folder / "annotations" / "train.json").is_file():
            return _read_coco(folder, OURS)
    raise PwsError(
        f"scenes: neither {root} nor {root / 'scenes'} holds annotations/train.json. Make the scenes: pws scenes "
        f"{root / 'scenes'}, or point --data.root at their folder."
    )


def _voc(root: Path) -> Parts:
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


def _digit_scenes(_: Path) -> Parts:
    train, test = (
        SceneImages("digits", part, count, DIGIT_SIZE)
        for part, count in zip(("train", "test"), DIGIT_SCENES, strict=True)
    )
    return train, test


DETECTION_DATASETS: Final[dict[str, Callable[[Path], Parts]]] = {
    "digit-scenes": _digit_scenes,
    "scenes": _scenes,
    "coco": _coco("instances"),
    "coco-keypoints": _coco("person_keypoints"),
    "voc": _voc,
}
"""Name to loader."""
