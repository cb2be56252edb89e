"""`pws scenes`: a small detection dataset, made once."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pws._errors import PwsError
from pws.cli.arguments import check_folder, check_jobs, command_parser, parse
from pws.training.detect.scene_files import SceneSettings, write_scenes
from pws.training.detect.scene_images import OBJECTS


def run(arguments: list[str]) -> int:
    """Parse, draw, write."""
    default = SceneSettings()
    parser = command_parser(
        "scenes",
        "Make a detection dataset of scenes: small images of known objects, cut out along their outline and placed over one "
        "another, with exact boxes, masks and keypoints. It writes images, COCO's JSON, and sheet.png to look at. The same "
        "settings give the same files.",
        "pws scenes data/scenes --train 2000 --test 500",
    )
    parser.add_argument("out", type=str, help="the folder to write, new or empty")
    parser.add_argument("--train", type=int, default=default.train, help="scenes for training")
    parser.add_argument("--test", type=int, default=default.test, help="scenes for testing, of other objects")
    parser.add_argument("--size", type=int, default=default.size, help="pixels per side")
    parser.add_argument("--objects", type=str, default=default.objects, help=f"one of {', '.join(OBJECTS)}")
    parser.add_argument("--seed", type=int, default=default.seed, help="decides what is drawn")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; all cores")
    parsed = parse(parser, arguments)
    settings = SceneSettings(parsed.train, parsed.test, parsed.size, parsed.objects, parsed.seed)
    check_jobs(parsed.jobs)
    out = Path(parsed.out)
    check_folder(out)
    if out.is_dir() and any(out.iterdir()):
        raise PwsError(
            f"OUT must be a new or an empty folder; {out} holds files, and nothing is overwritten. Name another."
        )
    _write(out, settings, parsed.jobs)
    print(f"{settings.train} training and {settings.test} test scenes: {out}; look at {out / 'sheet.png'}")
    return 0


def _write(out: Path, settings: SceneSettings, jobs: int) -> None:
    columns = (TextColumn("drawing scenes"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=settings.train + settings.test)
        write_scenes(out, settings, jobs, lambda done: bar.advance(task, done))
