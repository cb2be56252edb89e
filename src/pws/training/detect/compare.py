"""How far apart two lists of detections of one image are."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

TIES: Final = 1e-3
"""Of detections whose score is so near to the lowest, rounding decides which are kept."""


def detection_difference(found: dict[str, Tensor], expected: dict[str, Tensor], side: int) -> float:
    """The largest difference between detections and the nearest ones of the same class, those of lowest score left out.

    Of boxes in parts of the image's longer `side`, and of scores. Of masks and keypoints the median over the detections: where
    a box ends between two pixels, or two places are equally likely, rounding moves one of them by a whole pixel.

    Returns infinity if a detection has no partner.
    """
    if set(found) != set(expected) or len(found["scores"]) != len(expected["scores"]):
        return float("inf")
    if not len(expected["scores"]):
        return 0.0
    lowest = float(torch.minimum(found["scores"].min(), expected["scores"].min()))
    differences = [(found["scores"].sort().values - expected["scores"].sort().values).abs().max()]
    sure = (expected["scores"] > lowest + TIES).nonzero()[:, 0]
    if len(sure):
        partners = _partners(found, expected, sure, side)
        if partners is None:
            return float("inf")
        differences.append((found["boxes"][partners] - expected["boxes"][sure]).abs().max() / side)
        for name, unit in {"masks": 1, "keypoints": side, "keypoints_scores": 1}.items():
            if name in expected:
                apart = (found[name][partners] - expected[name][sure]).abs().flatten(1).amax(1) / unit
                differences.append(apart.median())
    return float(torch.stack(differences).max())


def _partners(found: dict[str, Tensor], expected: dict[str, Tensor], sure: Tensor, side: int) -> Tensor | None:
    """The nearest detection of the same class for each, one after the other; None if one has none."""
    boxes = torch.cdist(expected["boxes"][sure], found["boxes"], p=float("inf")) / side
    scores = (expected["scores"][sure, None] - found["scores"]).abs()
    apart = boxes.maximum(scores).masked_fill(expected["labels"][sure, None] != found["labels"], float("inf"))
    partners: list[int] = []
    for row in apart:
        partners.append(int(row.argmin()))
        if row[partners[-1]] == float("inf"):
            return None
        apart[:, partners[-1]] = float("inf")
    return torch.tensor(partners)
