"""What evaluating a checkpoint gives, by task."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Evaluation:
    """A classifier on the test images; accuracies in [0, 1]."""

    checkpoint: str
    images: int
    accuracy: float
    top5: float
    """Top-k with k the number of classes where there are fewer than five."""
    loss: float
    per_class: dict[str, float]


@dataclass
class DetectionEvaluation:
    """A detector on the test images; all figures in [0, 1], None where no object is that they could be taken of."""

    checkpoint: str
    images: int
    boxes: dict[str, float | None]
    """COCO's twelve figures: ap (over overlaps of 0.5 to 0.95), ap50, ap75, ap_small, ap_medium, ap_large, and average recall
    with 1, 10 and 100 detections of an image and by size."""
    masks: dict[str, float | None] | None
    """The same; None for a detector without masks."""
    voc_ap50: float | None
    """Pascal VOC's mean average precision of boxes at an overlap of 0.5: the area under the whole curve."""
    per_class: dict[str, dict[str, float | None]]
    """By class: box_ap, mask_ap where there are masks, and voc_ap50."""
