"""`pws export`: a run's network for other programs."""

from __future__ import annotations

from pathlib import Path

from pws.cli.arguments import command_parser, parse
from pws.training.export import FORMATS, Exported, export


def run(arguments: list[str]) -> int:
    """Parse, export, say how near the file's outputs are."""
    parser = command_parser(
        "export",
        "Write a run's network, folded to plain layers, in a format that other programs load. The file is read back, and its "
        "outputs are compared with the network's. A classifier's file takes normalized images, any number of them. A "
        "detector's ONNX file takes one image (3, height, width) of any size with values in [0, 1], and gives boxes in its "
        "pixels, labels, scores and masks.",
        "pws export runs/fashion-mnist-allconv-pws --format onnx",
    )
    parser.add_argument("run", type=str, help="the run's folder, or a checkpoint file of it")
    parser.add_argument("--format", type=str, default="onnx", help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("--checkpoint", type=str, default="best", help="best or last")
    parser.add_argument(
        "--out",
        type=str,
        help="the file to write; if left out, model.onnx, model.pt2 or model.safetensors in the run's folder",
    )
    parsed = parse(parser, arguments)
    written = export(parsed.run, parsed.format, Path(parsed.out) if parsed.out else None, parsed.checkpoint)
    print(f"{written.path}: {_told(written)}")
    return 0


def _told(written: Exported) -> str:
    apart = f"differ from the network's by at most {written.difference:.1e}"
    if not written.detector:
        return f"logits {apart}"
    if not written.compared:
        return "read back, but the network finds no object in the run's images, so that no detection could be compared"
    return f"{written.compared} detections {apart} (boxes in parts of the image's side)"
