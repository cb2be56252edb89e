"""A folder as COCO's with images of several shapes, and every kind of object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask
from PIL import Image

SHAPES = ((40, 64), (64, 40), (50, 50), (48, 72))
"""Height and width, in turn."""
POINTS = ["top", "left_end", "right_end"]


def content_of(count: int) -> dict[str, Any]:
    """Images of four shapes: with a polygon, an RLE as a list, a crowd in a compressed one; every fourth has no objects."""
    images, objects = [], list[dict[str, Any]]()
    for number in range(count):
        height, width = SHAPES[number % 4]
        images.append({"id": number, "file_name": f"{number}.{'jpg' if number % 2 else 'png'}"})
        images[-1] |= {"height": height, "width": width}
        if number % 4 == 3:
            continue
        left, top = 3.5 + number, 2.25 + number / 3
        polygon = [[left, top, left + 18, top, left + 18, top + 17.5], [2, 2, 9, 2, 9, 8.125]]
        runs = [10 * height + 5, 20, height - 20, 20, height * (width - 11) - 25]
        common = {"image_id": number}
        objects += [
            {**common, "category_id": 7, "bbox": [left, top, 18, 17.5], "segmentation": polygon, "area": 157.3},
            {
                **{**common, "category_id": 3, "bbox": [10, 5, 2, 20], "keypoints": [10, 5, 2, 0, 0, 0, 11, 24, 1]},
                "segmentation": {"size": [height, width], "counts": runs},
            },
            {
                **{**common, "category_id": 3, "bbox": [0, 0, width + 0.5, height], "iscrowd": number % 2},
                "segmentation": compressed(height, width),
            },
        ]
    categories = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog", "keypoints": POINTS}]
    return {"images": images, "annotations": [{"id": n, **o} for n, o in enumerate(objects)], "categories": categories}


def compressed(height: int, width: int) -> dict[str, Any]:
    """The RLE of a whole image."""
    encoded = mask.encode(np.asfortranarray(np.ones((height, width), np.uint8)))
    return {"size": [height, width], "counts": encoded["counts"].decode()}


def write_images(folder: Path, content: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for image in content["images"]:
        pixels = rng.integers(0, 256, (image["height"], image["width"], 3), np.uint8)
        Image.fromarray(pixels).save(folder / image["file_name"])


def write_parts(root: Path, contents: dict[str, dict[str, Any]]) -> Path:
    """A folder as COCO's: its images, and annotations under these names."""
    (root / "annotations").mkdir(parents=True)
    for name, content in contents.items():
        (root / "annotations" / f"{name}.json").write_text(json.dumps(content))
        write_images(root / name.split("_")[-1], content)
    return root
