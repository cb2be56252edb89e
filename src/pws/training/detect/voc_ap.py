"""Pascal VOC's average precision at an overlap of 0.5: the area under the whole precision-recall curve (VOC 2010 and later).

An object that is difficult, or a crowd, is neither hit nor miss, and what is found there is neither. Every other object is hit
once, by the detection of the highest score whose largest overlap is with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torchvision.ops import box_iou

OVERLAP: Final = 0.5


@dataclass(frozen=True)
class ImageBoxes:
    """What was found in an image, and what is there."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    true_boxes: Tensor
    true_labels: Tensor
    ignored: Tensor


def voc_ap50(images: Sequence[ImageBoxes], label: int) -> float | None:
    """Average precision of a class in [0, 1]; None if no image has an object of it that counts."""
    objects = sum(objects_of(image, label) for image in images)
    if not objects:
        return None
    found = [hits_of(image, label) for image in images]
    scores, hits, counts = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = scores[counts].argsort(descending=True, stable=True)
    right = hits[counts][order].double().cumsum(0)
    recall = right / objects
    precision = right / torch.arange(1, len(right) + 1, dtype=torch.float64)
    # The best precision at this recall or any larger one.
    envelope = precision.flip(0).cummax(0).values.flip(0) if len(right) else precision
    return float((envelope * recall.diff(prepend=recall.new_zeros(1))).sum())


def objects_of(image: ImageBoxes, label: int) -> int:
    """How many objects of a class count."""
    return int((~image.ignored[image.true_labels == label].bool()).sum())


def hits_of(image: ImageBoxes, label: int) -> tuple[Tensor, Tensor, Tensor]:
    """Score of each detection of a class, the highest first, whether it is a hit, and whether it counts."""
    own, there = image.labels == label, image.true_labels == label
    order = image.scores[own].argsort(descending=True, stable=True)
    scores, boxes, ignored = image.scores[own][order], image.boxes[own][order], image.ignored[there].bool()
    hits, counts = torch.zeros(len(scores), dtype=torch.bool), torch.ones(len(scores), dtype=torch.bool)
    if not len(ignored):
        return scores, hits, counts
    best, where = box_iou(boxes, image.true_boxes[there]).max(1) if len(boxes) else (scores, scores.long())
    taken = set[int]()
    for number, (overlap, place) in enumerate(zip(best.tolist(), where.tolist(), strict=True)):
        if overlap < OVERLAP:
            continue
        counts[number] = not ignored[place]
        hits[number] = place not in taken
        taken.add(place)
    return scores, hits, counts
