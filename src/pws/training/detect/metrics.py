"""COCO's figures of a detector, and VOC's average precision at an overlap of 0.5."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_convert

from pws.training.detect.samples import Target
from pws.training.detect.voc_ap import ImageBoxes, voc_ap50
from pws.training.module import from_all_processes

FIGURES: Final = {
    "map": "ap",
    "map_50": "ap50",
    "map_75": "ap75",
    "map_small": "ap_small",
    "map_medium": "ap_medium",
    "map_large": "ap_large",
    "mar_1": "ar1",
    "mar_10": "ar10",
    "mar_100": "ar100",
    "mar_small": "ar_small",
    "mar_medium": "ar_medium",
    "mar_large": "ar_large",
}
"""COCO's twelve figures: torchmetrics' name to ours."""
STATES: Final = (
    *("detection_box", "detection_scores", "detection_labels"),
    *("groundtruth_box", "groundtruth_labels", "groundtruth_crowds"),
)
"""Where torchmetrics keeps what `ImageBoxes` holds."""
KINDS: Final = {"bbox": "box", "segm": "mask"}
OVERLAPS: Final[list[float]] = np.linspace(0.5, 0.95, 10).tolist()
RECALLS: Final[list[float]] = np.linspace(0, 1, 101).tolist()
"""COCO's. torchmetrics rounds them to float32, and 0.6 of the objects found is then less than a recall of 0.6."""


def build_metric(*, masks: bool) -> MeanAveragePrecision:
    """COCO's metric of boxes, and of masks where there are some."""
    kinds: Any = ("bbox", "segm") if masks else ("bbox",)
    metric = MeanAveragePrecision(
        iou_type=kinds, compute_with_cache=False, backend="faster_coco_eval", sync_on_compute=False
    )
    metric.iou_thresholds, metric.rec_thresholds = OVERLAPS, RECALLS  # its arguments would be rounded too
    metric.warn_on_many_detections = False  # COCO takes the best hundred of each image
    return metric


def update_metric(metric: MeanAveragePrecision, predictions: list[dict[str, Tensor]], targets: list[Target]) -> None:
    """Add a batch; objects that are crowds, or difficult, are neither hits nor misses."""
    found = [_predicted(prediction) for prediction in predictions]
    metric.update(found, [_expected(target) for target in targets])


def gather(metric: MeanAveragePrecision) -> None:
    """Give each process what all of them have seen.

    torchmetrics gathers image by image, and processes with different numbers of images would wait for each other for ever.
    """
    own = {name: apply_to_collection(getattr(metric, name), Tensor, Tensor.cpu) for name in metric._defaults}
    seen = from_all_processes(own)
    for name in own:
        setattr(metric, name, [one for part in seen for one in part[name]])


def _predicted(prediction: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = {key: prediction[key] for key in ("boxes", "scores", "labels")}
    masks = prediction.get("masks")
    return kept if masks is None else {**kept, "masks": masks[:, 0] > 0.5}


def _expected(target: Target) -> dict[str, Tensor]:
    kept = {key: target[key] for key in ("boxes", "labels", "area")}
    kept["iscrowd"] = ignored_in(target).long()
    return kept if "masks" not in target else {**kept, "masks": target["masks"].bool()}


def ignored_in(target: Target) -> Tensor:
    """Which objects are neither hits nor misses: crowds, and difficult ones."""
    return target["iscrowd"].bool() | target.get("difficult", torch.zeros_like(target["iscrowd"])).bool()


def figures_of(metric: MeanAveragePrecision) -> dict[str, dict[str, float]]:
    """COCO's twelve figures by kind (box, mask), in [0, 1]; -1 where the data have no object of that size."""
    found = metric.compute()
    several = len(metric.iou_type) > 1
    return {
        KINDS[kind]: {ours: float(found[f"{kind}_{theirs}" if several else theirs]) for theirs, ours in FIGURES.items()}
        for kind in metric.iou_type
    }


def known_or_none(figure: float) -> float | None:
    """None for -1, torchmetrics' figure of nothing."""
    return None if figure < 0 else figure


def figures_by_class(metric: MeanAveragePrecision, classes: int) -> list[dict[str, float | None]]:
    """The figures of each class, in the order of the labels: box_ap, mask_ap where there are masks, voc_ap50."""
    metric.class_metrics = True
    found = metric.compute()
    metric.class_metrics = False
    several, there = len(metric.iou_type) > 1, found["classes"].reshape(-1).tolist()
    result: list[dict[str, float | None]] = []
    images = [_boxes_of(*parts) for parts in zip(*(getattr(metric, state) for state in STATES), strict=True)]
    for label in range(1, classes + 1):
        figures: dict[str, float | None] = {}
        for kind in metric.iou_type:
            values = found[f"{kind}_map_per_class" if several else "map_per_class"].reshape(-1)
            figures[f"{KINDS[kind]}_ap"] = known_or_none(float(values[there.index(label)])) if label in there else None
        result.append({**figures, "voc_ap50": voc_ap50(images, label)})
    return result


def _boxes_of(found: Tensor, scores: Tensor, labels: Tensor, there: Tensor, *others: Tensor) -> ImageBoxes:
    """torchmetrics keeps left, top, width, height."""
    found, there = (box_convert(boxes, "xywh", "xyxy") for boxes in (found, there))
    return ImageBoxes(found, scores, labels, there, *others)
