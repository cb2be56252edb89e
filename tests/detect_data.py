"""Small detection datasets as files, with values made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SQUARE = [[2, 1, 6, 1, 6, 5, 2, 5]]
"""Columns 2 to 5 and rows 1 to 4."""


def coco_content() -> dict[str, Any]:
    """An image of 8 rows and 10 columns with three objects, and one without any; category 7 comes before 3 in the list."""
    runs = [3 * 8 + 2, 3, 5, 3, 43]  # rows 2 to 4 of columns 3 and 4
    return {
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
        "images": [
            {"id": 40, "file_name": "a.png", "height": 8, "width": 10},
            {"id": 41, "file_name": "b.png", "height": 6, "width": 5},
        ],
        "annotations": [
            {"id": 1, "image_id": 40, "category_id": 7, "bbox": [2, 1, 4, 4], "segmentation": SQUARE, "area": 16.5},
            {
                **{"id": 2, "image_id": 40, "category_id": 3, "bbox": [3, 2, 2, 3], "iscrowd": 1},
                "segmentation": {"size": [8, 10], "counts": runs},
            },
            {
                **{"id": 3, "image_id": 40, "category_id": 3, "bbox": [8.5, 6, 2, 2.5]},
                "segmentation": {"size": [8, 10], "counts": "^22"},
            },
        ],
    }


def write_coco(folder: Path, content: Any, name: str = "train") -> tuple[Path, Path]:
    """The JSON and the images; returns their paths."""
    annotations, images = folder / "annotations" / f"{name}.json", folder / name
    annotations.parent.mkdir(exist_ok=True)
    images.mkdir()
    annotations.write_text(json.dumps(content))
    pixels = np.arange(8 * 10 * 3, dtype=np.uint8).reshape(8, 10, 3)
    Image.fromarray(pixels).save(images / "a.png")
    Image.fromarray(pixels[:6, :5]).save(images / "b.png")
    return annotations, images


def voc_xml(objects: str, width: int = 10, height: int = 8) -> str:
    return f"<annotation><size><width>{width}</width><height>{height}</height></size>{objects}</annotation>"


def voc_object(name: str = "dog", box: tuple[Any, ...] = (1, 2, 4, 5), more: str = "") -> str:
    sides = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name><bndbox>{sides}</bndbox>{more}</object>"


def write_voc(folder: Path, files: dict[str, str], split: str = "trainval") -> None:
    """A folder as VOC2007: XML by name, and an image of 8 rows and 10 columns each."""
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in files))
    for name, text in files.items():
        (folder / "Annotations" / f"{name}.xml").write_text(text)
        Image.new("RGB", (10, 8)).save(folder / "JPEGImages" / f"{name}.jpg")
