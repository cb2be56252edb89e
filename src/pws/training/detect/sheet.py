"""The sheet that `pws scenes` writes: scenes with what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from PIL import Image

from pws.training.detect.coco import CocoImages
from pws.training.detect.objects import true_objects
from pws.training.detect.pictures import draw_objects

ROWS, COLUMNS = 4, 6
SIDE: Final = 320
"""Pixels of a picture."""
GAP: Final = 6


def scene_sheet(folder: Path) -> None:
    """Write sheet.png: the first training scenes with the outlines, boxes, keypoints and classes of their objects."""
    images = CocoImages(folder / "annotations" / "train.json", folder / "train")
    sheet = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, ROWS * (SIDE + GAP) + GAP), "white")
    for number in range(min(len(images), ROWS * COLUMNS)):
        pixels, target = images.get(number)
        row, column = divmod(number, COLUMNS)
        picture = draw_objects(pixels, true_objects(target, images.classes), SIDE)
        sheet.paste(picture, (GAP + column * (SIDE + GAP), GAP + row * (SIDE + GAP)))
    sheet.save(folder / "sheet.png")
