"""A contact sheet: images with their true boxes, masks and classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import matplotlib
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

from pws.training.detect.coco import CocoImages

SHOWN: Final = 24
"""Images of a sheet."""
FONT: Final = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
COLUMNS: Final = 6
SIDE: Final = 320
"""Pixels of an image on the sheet at least: names of classes are too large for smaller ones."""
COLOURS: Final = (
    "#e6194b",
    "#3cb44b",
    "#ffe119",
    "#4363d8",
    "#f58231",
    "#46f0f0",
    "#f032e6",
    "#bcf60c",
    "#fabebe",
    "#ffffff",
)
"""Of the objects of an image, one after the other."""


def scene_sheet(images: CocoImages) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The first images, `(H, W, 3)` uint8."""
    drawn = [_drawn(images, number) for number in range(min(SHOWN, len(images)))]
    sheet: Tensor = make_grid(drawn, nrow=COLUMNS, padding=4, pad_value=255)
    return sheet.permute(1, 2, 0).contiguous().numpy()


def _drawn(images: CocoImages, number: int) -> Tensor:
    pixels, target = images.get(number)
    factor = max(1, SIDE // pixels.shape[-1])
    large = F.interpolate(pixels[None], scale_factor=factor)[0]
    if not len(target["labels"]):
        return large
    colours = [COLOURS[n % len(COLOURS)] for n in range(len(target["labels"]))]
    masks = F.interpolate(target["masks"].as_subclass(torch.Tensor)[None], scale_factor=factor)[0].bool()
    names = [images.classes[label - 1] for label in target["labels"].tolist()]
    filled = draw_segmentation_masks(large, masks, alpha=0.3, colors=colours)
    boxes = target["boxes"].as_subclass(torch.Tensor) * factor
    lettered: Tensor = draw_bounding_boxes(
        *(filled, boxes, names, colours),
        width=2,
        font=str(FONT),
        font_size=13,
        label_colors="white",
        label_background_colors="black",
        fill_labels=True,
    )
    return lettered
