"""Scenes in files: images, COCO's JSON and a sheet to look at."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

from PIL import Image

from pws._errors import UnknownNameError
from pws._files import folder_written_whole
from pws.training.detect.coco import CocoImages
from pws.training.detect.coco_masks import compressed
from pws.training.detect.scene_images import KEYPOINTS, OBJECTS, PARTS, scene_target
from pws.training.detect.scene_sheet import scene_sheet
from pws.training.detect.scenes import Scene, draw_scene
from pws.training.rules import SEED, Rule, check_rules

COUNT: Final[Rule] = ("at least 1, and at most 1,000,000", lambda value: 1 <= value <= 10**6)
RULES: Final[dict[str, Rule]] = {
    **{"train": COUNT, "test": COUNT, "seed": SEED},
    "size": ("at least 32, and at most 4,096", lambda value: 32 <= value <= 4096),
}
CHUNK: Final = 20
"""Scenes that are drawn before they are told of."""
WORTH_A_PROCESS: Final = 250
"""Scenes that take longer than to start a process."""

Record = dict[str, Any]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class SceneSettings:
    """What decides every byte of the files.

    Raises:
        UnknownNameError: no such objects.
        PwsError: a number breaks its rule.
    """

    train: int = 2000
    test: int = 500
    size: int = 160
    objects: str = "fashion-mnist"
    seed: int = 0

    def __post_init__(self) -> None:
        check_rules(RULES, self, "--")
        if self.objects not in OBJECTS:
            raise UnknownNameError("--objects", self.objects, OBJECTS)


def write_scenes(folder: Path, settings: SceneSettings, jobs: int, progress: Progress) -> None:
    """Write a new folder, whole or not at all; `progress` hears of the scenes that are done.

    Raises:
        PwsError: the objects' files are missing.
        OSError: the folder can't be written, or holds something.
    """
    for part in PARTS:
        OBJECTS[settings.objects](part)  # their files are missing here, or nowhere
    with folder_written_whole(folder) as whole:
        for name in ("annotations", *PARTS):
            (whole / name).mkdir()
        drawn: dict[str, list[list[Record]]] = {part: [] for part in PARTS}
        for part, records in _drawn(whole, settings, jobs):
            drawn[part] += records
            progress(len(records))
        for part, scenes in drawn.items():
            content = json.dumps(_coco(settings, part, scenes))
            (whole / "annotations" / f"{part}.json").write_text(content, encoding="utf-8")
        sheet = scene_sheet(CocoImages(whole / "annotations" / "train.json", whole / "train"))
        Image.fromarray(sheet).save(whole / "sheet.png")


def _drawn(whole: Path, settings: SceneSettings, jobs: int) -> Iterator[tuple[str, list[list[Record]]]]:
    """Part and annotations of chunk after chunk, in order; the images are written."""
    counts = {"train": settings.train, "test": settings.test}
    chunks = [(part, range(n, min(n + CHUNK, counts[part]))) for part in PARTS for n in range(0, counts[part], CHUNK)]
    draw = partial(_draw_chunk, whole, settings)
    processes = min(jobs, sum(counts.values()) // WORTH_A_PROCESS)
    if processes < 2:
        yield from map(draw, chunks)
        return
    # A forked process would inherit torch's thread pool in an unknown state.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(draw, chunks)


def _draw_chunk(whole: Path, settings: SceneSettings, chunk: tuple[str, range]) -> tuple[str, list[list[Record]]]:
    """Write the images of these scenes; returns their part and the annotations of each."""
    part, numbers = chunk
    cutouts, found = OBJECTS[settings.objects](part), []
    for number in numbers:
        scene = draw_scene(cutouts, settings.size, seed=settings.seed, part=PARTS.index(part), number=number)
        Image.fromarray(scene.image).save(whole / part / f"{number:06}.png")
        found.append(_annotations(scene))
    return part, found


def _annotations(scene: Scene) -> list[Record]:
    target = scene_target(scene)
    rows = zip(target["boxes"].int().tolist(), target["area"].int().tolist(), target["keypoints"].int(), strict=True)
    return [
        {
            **{
                "category_id": int(label) + 1,
                "bbox": [left, top, right - left, bottom - top],
                "area": area,
                "iscrowd": 0,
            },
            **{"segmentation": compressed(mask), "keypoints": points.flatten().tolist(), "num_keypoints": len(points)},
        }
        for label, mask, ((left, top, right, bottom), area, points) in zip(scene.labels, scene.masks, rows, strict=True)
    ]


def _coco(settings: SceneSettings, part: str, scenes: list[list[Record]]) -> Record:
    classes = OBJECTS[settings.objects](part).classes
    side = settings.size
    images, annotations = list[Record](), list[Record]()
    for number, records in enumerate(scenes):
        images.append({"id": number, "file_name": f"{number:06}.png", "height": side, "width": side})
        annotations += [{"id": len(annotations) + n, "image_id": number, **r} for n, r in enumerate(records, 1)]
    return {
        "info": {"description": f"Scenes of {settings.objects}, made by pws scenes", "part": part, **asdict(settings)},
        "categories": [
            {"id": number, "name": name, "keypoints": KEYPOINTS, "skeleton": []}
            for number, name in enumerate(classes, 1)
        ],
        **{"images": images, "annotations": annotations},
    }
