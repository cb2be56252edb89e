"""Small detectors and a batch for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pws.models.detector_spec import DetectorSpec
from pws.models.detectors import build_detector

Example = tuple[list[Tensor], list[dict[str, Tensor]]]
QUICK = {"box_batch_size_per_image": 16, "rpn_pre_nms_top_n_train": 50, "rpn_pre_nms_top_n_test": 50}
"""Regions of an R-CNN, few."""
FEW = {**QUICK, "rpn_post_nms_top_n_train": 50, "rpn_post_nms_top_n_test": 50, "box_detections_per_img": 10}


def small(name: str, **settings: Any) -> nn.Module:
    """A detector for images of 64 pixels and three classes; the same on every call."""
    torch.manual_seed(0)
    settings.setdefault("width", 1.0 if name.startswith("ssdlite") else 0.125)
    options = FEW if "rcnn" in name else {}
    return build_detector(name, DetectorSpec(3, 64, anchor_size=16, keypoints=4, options=options, **settings))


def two_objects() -> Example:
    """An image with two objects, and a wider one without any."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 64, 64, generator=generator), torch.rand(3, 64, 80, generator=generator)]
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[0, 10:40, 8:30], masks[1, 20:60, 30:60] = 1, 1
    full = {
        "boxes": torch.tensor([[8.0, 10.0, 30.0, 40.0], [30.0, 20.0, 60.0, 60.0]]),
        "labels": torch.tensor([1, 3]),
        "masks": masks,
        "keypoints": torch.tensor([[[10.0, 12.0, 1.0]] * 4, [[40.0, 30.0, 1.0]] * 4]),
    }
    return images, [
        full,
        {key: value[:0] for key, value in full.items() if key != "masks"}
        | {"masks": masks[:0, :, :1].expand(0, 64, 80)},
    ]
