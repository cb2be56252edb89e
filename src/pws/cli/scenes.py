"""`pws scenes`: detection data without a download."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.progress import Progress as Bar

from pws._errors import PwsError
from pws._files import folder_written_whole
from pws.cli.arguments import check_folder, check_jobs, command_parser, parse
from pws.training.detect.sheet import scene_sheet
from pws.training.detect.write_scenes import SceneSettings, write_objects, write_scenes
from pws.training.parsing import parse_as

SIZES = (32, 2048)
MOST = 1_000_000


def run(arguments: list[str]) -> int:
    """Parse, draw, write, say how to go on."""
    parser = command_parser(
        "scenes",
        "Draw images of known objects, cut out along their outline and placed over clutter, with exact boxes and masks: PNG "
        "files and COCO's JSON, which data.name scenes reads. The same settings give the same files.",
        "pws scenes data/scenes && pws train scenes-mask-rcnn --data.root data/scenes",
    )
    parser.add_argument("out", type=str, help="folder to write; it must be new or empty")
    parser.add_argument("--objects", type=str, default="fashion-mnist", help="fashion-mnist or digits")
    parser.add_argument("--train", type=int, default=2000, help="number of training images")
    parser.add_argument("--test", type=int, default=500, help="number of test images")
    parser.add_argument("--size", type=int, default=160, help="pixels per side")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other scenes")
    parser.add_argument(
        "--single",
        action="store_true",
        help="one object per image and a folder per class, which data.name folder reads: to train a backbone first",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; all cores")
    parsed = parse(parser, arguments)
    settings, out = _checked(parsed), Path(parsed.out)
    with folder_written_whole(out) as partial, Bar() as bar:
        task = bar.add_task("drawing", total=settings.train + settings.test)
        write = write_objects if parsed.single else write_scenes
        write(partial, settings, parsed.jobs, lambda done, _: bar.update(task, completed=done))
        if not parsed.single:
            scene_sheet(partial)
    kind = "--data.name folder" if parsed.single else "--data.name scenes"
    print(f"{out}: {settings.train:,} training and {settings.test:,} test images; {kind} --data.root {out} reads them")
    return 0


def _checked(parsed: Any) -> SceneSettings:
    out = Path(parsed.out)
    check_jobs(parsed.jobs)
    check_folder(out.absolute().parent)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PwsError(f"{out} exists already, and nothing is overwritten. Name another folder, or remove it.")
    for flag, low, high in (("train", 1, MOST), ("test", 1, MOST), ("size", *SIZES), ("seed", 0, 2**32 - 1)):
        if not low <= getattr(parsed, flag) <= high:
            raise PwsError(f"--{flag} must be {low:,} to {high:,}; got {getattr(parsed, flag):,}.")
    names = {key: getattr(parsed, key) for key in ("objects", "train", "test", "size", "seed")}
    settings: SceneSettings = parse_as(SceneSettings, names, "pws scenes")
    return settings
