"""Scenes as files: PNG images and COCO's JSON, or one object per image in a folder per class."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from faster_coco_eval.core import mask as run_lengths
from PIL import Image
from torch import Tensor

from pws.training.detect.drawn import KEYPOINTS, DrawnImages, digit_cutouts, fashion_cutouts
from pws.training.detect.samples import Target
from pws.training.detect.scenes import Cutouts, draw_object

Objects = Literal["fashion-mnist", "digits"]
Progress = Callable[[int, int], None]
PARTS: Final = ("train", "test")
CLASSIFIER_PARTS: Final = ("train", "val")


@dataclass(frozen=True)
class SceneSettings:
    """What is drawn."""

    objects: Objects = "fashion-mnist"
    train: int = 2000
    test: int = 500
    size: int = 160
    seed: int = 0


def write_scenes(folder: Path, settings: SceneSettings, jobs: int, progress: Progress) -> None:
    """Draw all scenes into `folder`: train/, test/, annotations/train.json and test.json, sheet.png."""
    (folder / "annotations").mkdir()
    total = settings.train + settings.test
    done = 0
    for part, name in enumerate(PARTS):
        count = getattr(settings, name)
        (folder / name).mkdir()
        entries = []
        for entry in _in_parallel(partial(_write_scene, folder / name, settings, part), count, jobs):
            entries.append(entry)
            done += 1
            progress(done, total)
        content = _coco(settings, name, entries)
        (folder / "annotations" / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def write_objects(folder: Path, settings: SceneSettings, jobs: int, progress: Progress) -> None:
    """Draw single objects into `folder`: train/CLASS/ and val/CLASS/, what data.name folder reads."""
    total, done = settings.train + settings.test, 0
    classes = _cutouts(settings.objects)[0].classes
    for part, (name, source) in enumerate(zip(CLASSIFIER_PARTS, PARTS, strict=True)):
        for label in classes:
            (folder / name / _file_name(label)).mkdir(parents=True)
        for _ in _in_parallel(partial(_write_object, folder / name, settings, part), getattr(settings, source), jobs):
            done += 1
            progress(done, total)


def _in_parallel(work: Callable[[int], Any], count: int, jobs: int) -> Iterator[Any]:
    """`work` of 0 to `count`, in order."""
    if jobs == 1:
        yield from map(work, range(count))
        return
    with get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(work, range(count), chunksize=16)


_loaded: dict[str, tuple[Cutouts, Cutouts]] = {}


def _cutouts(objects: str) -> tuple[Cutouts, Cutouts]:
    """Read once per process."""
    if objects not in _loaded:
        _loaded[objects] = digit_cutouts() if objects == "digits" else fashion_cutouts()
    return _loaded[objects]


def _write_scene(folder: Path, settings: SceneSettings, part: int, number: int) -> dict[str, Any]:
    images = DrawnImages(_cutouts(settings.objects)[part], settings.size, part, number + 1, settings.seed)
    pixels, target = images.get(number)
    _write_png(folder / images.name(number), pixels)
    return {"file_name": images.name(number), "annotations": list(_annotations(target))}


def _write_object(folder: Path, settings: SceneSettings, part: int, number: int) -> None:
    cutouts = _cutouts(settings.objects)[part]
    image, label = draw_object(cutouts, settings.size, seed=settings.seed, part=part, number=number)
    path = folder / _file_name(cutouts.classes[label]) / f"{number:06}.png"
    Image.fromarray(image).save(path)


def _file_name(label: str) -> str:
    return label.replace("/", "-").replace(" ", "-")


def _write_png(path: Path, pixels: Tensor) -> None:
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)


def _annotations(target: Target) -> Iterator[dict[str, Any]]:
    for box, label, mask, points in zip(
        *(target[key] for key in ("boxes", "labels", "masks", "keypoints")), strict=True
    ):
        left, top, right, bottom = box.tolist()
        encoded = run_lengths.encode(np.asfortranarray(mask.numpy()))
        yield {
            "category_id": int(label),
            "bbox": [left, top, right - left, bottom - top],
            "area": float(mask.sum()),
            "segmentation": {"size": list(mask.shape), "counts": encoded["counts"].decode()},
            "iscrowd": 0,
            "keypoints": points.flatten().tolist(),
            "num_keypoints": len(KEYPOINTS),
        }


def _coco(settings: SceneSettings, part: str, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """COCO's JSON of a part; ids count from 1."""
    classes = _cutouts(settings.objects)[0].classes
    side = {"height": settings.size, "width": settings.size}
    images = [{"id": number, "file_name": entry["file_name"], **side} for number, entry in enumerate(entries, 1)]
    objects = [{"image_id": number, **item} for number, entry in enumerate(entries, 1) for item in entry["annotations"]]
    return {
        "info": {"description": f"pws scenes, part {part}", **asdict(settings)},
        "images": images,
        "annotations": [{"id": number, **item} for number, item in enumerate(objects, 1)],
        "categories": [{"id": n, "name": name, "keypoints": list(KEYPOINTS)} for n, name in enumerate(classes, 1)],
    }
