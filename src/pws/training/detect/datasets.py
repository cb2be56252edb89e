"""The detection datasets: where their files are looked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from pws._errors import PwsError, UnknownNameError
from pws.training.datasets import chosen_images
from pws.training.detect.coco import CocoImages
from pws.training.detect.drawn import DrawnImages, digit_cutouts
from pws.training.detect.samples import DetectionImages, DetectionSplits
from pws.training.detect.voc import VocImages
from pws.training.recipe import DataConfig

KIND: Final = "KIND"
LAYOUTS: Final = (("train", "train", "test", "test"), ("KIND_train2017", "train2017", "KIND_val2017", "val2017"))
"""Names below annotations/ and of the image folders, of training and test images: ours, then COCO's."""
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
    train, test = DETECTION_DATASETS[config.name](Path(config.root))
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes)) or "another order"
        raise PwsError(f"{config.name}: training and test images must have the same classes; they differ in {odd}.")
    if not len(train) or not len(test):
        raise PwsError(
            f"{config.name} in {config.root} has {len(train)} training and {len(test)} test images: none to use."
        )
    chosen = chosen_images(config, len(train), seed)
    if chosen is not None:
        train.numbers = [train.numbers[number] for number in chosen]
    return DetectionSplits(train, test, train.classes)


def _coco(kind: str) -> Callable[[Path], Parts]:
    def load(root: Path) -> Parts:
        for layout in LAYOUTS:
            train, train_images, test, test_images = (part.replace(KIND, kind) for part in layout)
            if (root / "annotations" / f"{train}.json").is_file():
                return _both(root, (train, train_images), (test, test_images))
        tried = " or ".join(f"annotations/{layout[0].replace(KIND, kind)}.json" for layout in LAYOUTS)
        raise PwsError(f"{root} has no {tried}. Point --data.root at the folder that holds annotations and the images.")

    return load


def _both(root: Path, *parts: tuple[str, str]) -> Parts:
    train, test = (CocoImages(root / "annotations" / f"{name}.json", root / images) for name, images in parts)
    return train, test


def _scenes(root: Path) -> Parts:
    for folder in (root, root / "scenes"):
        if (folder / "annotations" / "train.json").is_file():
            return _coco("instances")(folder)
    raise PwsError(f"scenes are made once, and there are none in {root}. Make them: pws scenes {root / 'scenes'}")


def _voc(root: Path) -> Parts:
    years = [root / f"VOC{year}" for year in (2007, 2012) if (root / f"VOC{year}").is_dir()]
    if root / "VOC2007" not in years:
        raise PwsError(
            f"voc tests on VOC 2007, and {root / 'VOC2007'} does not exist. Point --data.root at the folder (VOCdevkit) that "
            "holds VOC2007, and VOC2012 if it is to be trained on too."
        )
    return VocImages([(year, "trainval") for year in years]), VocImages([(root / "VOC2007", "test")])


def _digit_scenes(_: Path) -> Parts:
    parts = enumerate(zip(digit_cutouts(), DIGIT_SCENES, strict=True))
    train, test = (DrawnImages(cutouts, DIGIT_SIZE, part, count) for part, (cutouts, count) in parts)
    return train, test


DETECTION_DATASETS: Final[dict[str, Callable[[Path], Parts]]] = {
    "digit-scenes": _digit_scenes,
    "scenes": _scenes,
    "coco": _coco("instances"),
    "coco-keypoints": _coco("person_keypoints"),
    "voc": _voc,
}
"""Name to loader."""
