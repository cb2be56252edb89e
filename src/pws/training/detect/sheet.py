"""Sheets of pictures with boxes and masks."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from pws.training.detect.coco import CocoImages
from pws.training.detect.samples import Target

ROWS, COLUMNS = 4, 6
ENLARGED: Final = 320
"""Pixels of the shorter side of a picture at least: labels and lines keep their size."""
COLOURS: Final = (
    "#e6194b",
    "#3cb44b",
    "#4363d8",
    "#f58231",
    "#911eb4",
    "#42d4f4",
    "#f032e6",
    "#bfef45",
    "#ffe119",
    "#469990",
)


def scene_sheet(folder: Path) -> None:
    """Write sheet.png: the first training scenes of `pws scenes` with their boxes and masks."""
    images = CocoImages(folder / "annotations" / "train.json", folder / "train")
    figure = Figure(figsize=(2.6 * COLUMNS, 2.6 * ROWS + 0.4))
    figure.suptitle("The first training scenes: boxes, classes and masks", fontsize=14)
    for number in range(min(len(images), ROWS * COLUMNS)):
        axes = figure.add_subplot(ROWS, COLUMNS, number + 1)
        pixels, target = images.get(number)
        axes.imshow(drawn(pixels, target, images.classes).permute(1, 2, 0).numpy())
        axes.set_axis_off()
    figure.tight_layout()
    figure.savefig(folder / "sheet.png", dpi=100)


def drawn(pixels: Tensor, target: Target, classes: list[str]) -> Tensor:
    """The image with masks in colour, and boxes with their class; small images are enlarged."""
    scale = max(1, -(-ENLARGED // min(pixels.shape[1:])))
    large = pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    if not len(target["labels"]):
        return large
    names = [classes[int(label) - 1] for label in target["labels"]]
    colours = [COLOURS[int(label) % len(COLOURS)] for label in target["labels"]]
    masks = target.get("masks")
    if masks is not None:
        wide = masks.as_subclass(Tensor).bool().repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        large = draw_segmentation_masks(large, wide, alpha=0.35, colors=list(colours))
    boxes = target["boxes"].as_subclass(Tensor) * scale
    result: Tensor = draw_bounding_boxes(large, boxes.round().to(torch.int64), names, colours, width=2)
    return result
