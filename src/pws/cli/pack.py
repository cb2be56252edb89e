"""`pws pack`: images into shards that training streams."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pws._errors import PwsError
from pws.cli.arguments import check_folder, check_jobs, command_parser, parse
from pws.training.detect.pack_source import coco_source, is_coco
from pws.training.pack import pack
from pws.training.pack_sources import IN_MEMORY, Source, source_of

SIDES = (8, 8192)


def run(arguments: list[str]) -> int:
    """Parse, pack, say how to go on."""
    parser = command_parser(
        "pack",
        "Write images into shards, large files that data.name stream reads from a disk or an object store. Files keep their "
        "bytes. Each shard is stored when it is done: the same command goes on where it was interrupted. At the end every "
        "shard's checksum is verified.",
        "pws pack data/imagenet data/shards --jobs 8 && pws train imagenet-resnet50-pws --data.name stream --data.root "
        "data/shards",
    )
    parser.add_argument(
        "source",
        type=str,
        help="a folder with train/CLASS/..., val/CLASS/... and perhaps test/CLASS/...; for task detect a folder that "
        f"data.name coco reads, such as that of pws scenes; or {_names()}",
    )
    parser.add_argument("out", type=str, help="folder to write; new, empty, or left by an interrupted packing")
    parser.add_argument("--size", type=int, help="resize images whose shorter side is longer than this")
    parser.add_argument(
        "--keypoints", action="store_true", help="of COCO, pack person_keypoints_*.json, not instances_*.json"
    )
    parser.add_argument("--root", type=str, default="data", help=f"folder of the files of {_names()}")
    parser.add_argument("--download", action="store_true", help="let torchvision download what is missing there")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; all cores")
    parsed = parse(parser, arguments)
    check_jobs(parsed.jobs)
    if parsed.size is not None and not SIDES[0] <= parsed.size <= SIDES[1]:
        raise PwsError(f"--size must be {SIDES[0]} to {SIDES[1]:,} pixels; got {parsed.size}.")
    out = Path(parsed.out)
    check_folder(out.absolute().parent)
    source = _source(parsed)
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("packing", total=source.images)
        index = pack(
            *(source, out, parsed.jobs),
            lambda doing, done, total: bar.update(task, description=doing, completed=done, total=total),
        )
    counts = ", ".join(f"{sum(s.images for s in own):,} {part}" for part, own in index.parts.items())
    shards = sum(map(len, index.parts.values()))
    print(f"{out}: {counts} images in {shards:,} shards; --data.name stream --data.root {out} reads them")
    return 0


def _source(parsed: Any) -> Source:
    """What is to be packed: COCO's files, or images of classes."""
    if parsed.source not in IN_MEMORY and is_coco(Path(parsed.source)):
        if parsed.size is not None:
            raise PwsError(
                f"--size is for images of classes, and {parsed.source} holds COCO's: their boxes and masks would have to be "
                "scaled too. Leave it out; --data.image_size sets the size in training."
            )
        return coco_source(Path(parsed.source), keypoints=parsed.keypoints)
    if parsed.keypoints:
        raise PwsError(
            f"--keypoints is for a folder of COCO, and {parsed.source} has no annotations/*.json. Leave it out."
        )
    return source_of(parsed.source, parsed.root, parsed.size, download=parsed.download)


def _names() -> str:
    return f"{', '.join(IN_MEMORY[:-1])} or {IN_MEMORY[-1]}"
