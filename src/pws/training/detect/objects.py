"""Objects of an image: what a detector has found, or what is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle
from torch import Tensor

from pws.training.detect.samples import Target


@dataclass(frozen=True)
class SeenObject:
    """An object in the pixels of its image; without a score it is a true one."""

    label: int
    name: str
    box: Tensor
    """Left, top, right, bottom."""
    score: float | None = None
    mask: Tensor | None = None
    """`(H, W)` bool."""
    keypoints: Tensor | None = None
    """`(K, 3)`: x, y and, of those found, a score, else the visibility."""

    def record(self) -> dict[str, Any]:
        """For a JSON file: the box in pixels, the mask as COCO's RLE."""
        found: dict[str, Any] = {"label": self.label, "class": self.name, "score": self.score, "box": self.box.tolist()}
        if self.mask is not None:
            code = rle.encode(np.asfortranarray(self.mask.numpy().astype(np.uint8)))
            found["mask"] = {"size": list(code["size"]), "counts": code["counts"].decode()}
        if self.keypoints is not None:
            found["keypoints"] = self.keypoints.tolist()
        return found


def found_objects(prediction: dict[str, Tensor], classes: Sequence[str], score: float) -> list[SeenObject]:
    """What a detector has found with this score or more, the surest first."""
    found = {name: value.detach().cpu() for name, value in prediction.items()}
    scores, labels = found["scores"], found["labels"].tolist()
    order = scores.argsort(descending=True, stable=True)
    masks, keypoints, sure = (found.get(name) for name in ("masks", "keypoints", "keypoints_scores"))
    return [
        SeenObject(
            *(labels[k], classes[labels[k] - 1], found["boxes"][k], float(scores[k])),
            None if masks is None else masks[k, 0] > 0.5,
            None if keypoints is None or sure is None else _scored(keypoints[k], sure[k]),
        )
        for k in order.tolist()
        if scores[k] >= score
    ]


def _scored(points: Tensor, scores: Tensor) -> Tensor:
    """torchvision's third number is always 1."""
    found = points.clone()
    found[:, 2] = scores
    return found


def true_objects(target: Target, classes: Sequence[str]) -> list[SeenObject]:
    """What is there; a crowd, or an object that is difficult, is called so."""
    there = {name: value.cpu() for name, value in target.items()}
    labels, masks, keypoints = there["labels"].tolist(), there.get("masks"), there.get("keypoints")
    remarks = {" (crowd)": there["iscrowd"], " (difficult)": there.get("difficult")}
    return [
        SeenObject(
            label,
            classes[label - 1] + "".join(word for word, flags in remarks.items() if flags is not None and flags[k]),
            there["boxes"][k],
            None,
            None if masks is None else masks[k].bool(),
            None if keypoints is None else keypoints[k],
        )
        for k, label in enumerate(labels)
    ]
