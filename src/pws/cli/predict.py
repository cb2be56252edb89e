"""`pws predict`: what a run's network finds in image files."""

from __future__ import annotations

import json
from pathlib import Path

from pws.cli.arguments import add_force, check_free, command_parser, parse
from pws.training.predict import outputs_of, predict
from pws.training.quiet import quiet_lightning


def run(arguments: list[str]) -> int:
    """Parse, predict, say what was found in each file."""
    parser = command_parser(
        "predict",
        "Look at image files with a run's network. For each file a picture OUT/NAME.png and OUT/NAME.json are written: the "
        "objects that a detector finds (boxes in pixels of the file, masks as COCO's RLE), or a classifier's five likeliest "
        "classes. Images are turned as their EXIF data say; for a classifier they are resized, cropped and made grey as the "
        "run's test images are.",
        "pws predict runs/NAME photo.jpg more/*.png --score 0.3",
    )
    parser.add_argument("run", type=str, help="the run's folder")
    parser.add_argument("files", type=str, nargs="+", metavar="FILE", help="images")
    parser.add_argument("--checkpoint", type=str, default="best", help="best, last, or the path of a checkpoint")
    parser.add_argument("--score", type=float, help="detectors: leave out objects below it; 0.5 if left out")
    parser.add_argument("--out", type=str, default="predictions", help="the folder to write to")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a line per file")
    add_force(parser)
    parsed = parse(parser, arguments)
    files, out = [Path(file) for file in parsed.files], Path(parsed.out)
    check_free(*(path for file in files for path in outputs_of(file, out)), force=parsed.force)
    quiet_lightning()
    records = []
    for number, found in enumerate(predict(Path(parsed.run), files, out, parsed.checkpoint, parsed.score), start=1):
        records.append(found.record)
        if not parsed.json:
            count = f"{number:{len(str(len(files)))}}/{len(files)}  " if len(files) > 1 else ""
            print(f"{count}{found.file}: {found.line} -> {found.picture}", flush=True)
    if parsed.json:
        print(json.dumps(records, indent=2))
    return 0
