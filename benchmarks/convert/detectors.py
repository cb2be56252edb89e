"""torchvision's detectors: converted, trained for twenty steps, evaluated, folded, diagnosed."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any, Final

import torch
from torch import Tensor, nn

import pws
from benchmarks.convert.check import LARGEST, Checked, compare_with_plan, note_failures
from pws import optim
from pws.bench.result_file import commit
from pws.models import model_of
from pws.models.detectors import hidden_layers
from pws.training.detect.data import DetectionData
from pws.training.detect.metrics import build_metric, figures_of, update_metric
from pws.training.recipe import DataConfig

DETECTORS: Final = tuple(
    f"torchvision:{name}"
    for name in (
        *("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_fpn"),
        *("fasterrcnn_mobilenet_v3_large_320_fpn", "maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2"),
        *("keypointrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn"),
        *("ssd300_vgg16", "ssdlite320_mobilenet_v3_large"),
    )
)
STEPS: Final = 20
DIFFERENT: Final = 4
"""Batches of those steps: over so few steps a loss falls for certain on images that come again."""
LR: Final = 0.005
SIZE: Final = 128
"""Pixels of the shorter side; SSD resizes to its own."""
CLASSES: Final = 10

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


def check_detector(spec: str) -> Checked:
    """Convert the detector that `spec` names and do everything that a user would; failures are noted, not raised."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keypoints = {"num_keypoints": 4} if "keypoint" in spec else {}
    model = _built(spec, **keypoints)
    checked = Checked(sum(p.numel() for p in model.parameters()), commit=commit())
    if checked.parameters > LARGEST:
        checked.not_run = f"more than {LARGEST // 10**6} million parameters"
        return checked
    data = DetectionData(DataConfig(name="digit-scenes", batch_size=2, validation=0), seed=0)
    batches = [batch for batch in data.train_dataloader() if all(len(target["boxes"]) for target in batch[1])]
    with note_failures(checked):
        _check(model, batches, next(iter(data.test_dataloader())), checked)
    return checked


def _built(spec: str, **settings: Any) -> nn.Module:
    from torchvision.models import get_model

    if settings:
        model: Any = get_model(spec.partition(":")[2], weights=None, weights_backbone=None, num_classes=2, **settings)
        # A Keypoint R-CNN of torchvision knows one class.
        return _resized(model)
    return _resized(model_of(spec, num_classes=CLASSES + 1))


def _resized(model: Any) -> nn.Module:
    if getattr(model.transform, "fixed_size", None) is None:
        model.transform.min_size, model.transform.max_size = (SIZE,), 2 * SIZE
    result: nn.Module = model
    return result


def _one_class(model: nn.Module, batch: Batch) -> Batch:
    """All objects of one class, for a Keypoint R-CNN."""
    if not hasattr(getattr(model, "roi_heads", None), "keypoint_head") or model.roi_heads.keypoint_head is None:  # type: ignore[union-attr]
        return batch
    return batch[0], [{**target, "labels": torch.ones_like(target["labels"])} for target in batch[1]]


def _check(model: nn.Module, batches: list[Batch], test: Batch, checked: Checked) -> None:
    batches = [_one_class(model, batch) for batch in batches[:DIFFERENT]]
    test = _one_class(model, test)
    example = (
        [image for images, _ in batches[:2] for image in images],
        [t for _, targets in batches[:2] for t in targets],
    )
    plan = pws.plan(model, example, norms=("batch", "group"), standardize=hidden_layers(model))
    converted = plan.apply()
    checks = compare_with_plan(plan, model, converted, checked)
    before = _mean_loss(converted.train(), batches)
    steps = _train(converted, batches)
    checked.losses = [before, _mean_loss(converted, batches)]
    checks["the loss is not finite"] = all(math.isfinite(loss) for loss in [*steps, *checked.losses])
    checks["the loss does not fall"] = checked.losses[1] < before
    converted.eval()
    folded = pws.fold(converted)
    with torch.no_grad():
        found, again = converted(test[0]), folded(test[0])
    checked.fold_difference = _difference(found, again)
    checks["the fold differs"] = checked.fold_difference == 0
    metric = build_metric(masks="masks" in found[0])
    update_metric(metric, found, test[1])
    checks["the average precision is not finite"] = all(0 <= part["ap"] <= 1 for part in figures_of(metric).values())
    diagnosis = pws.diagnose(converted.train(), batches[0], lr=LR)
    checks["the diagnosis misses layers"] = {layer.name for layer in diagnosis.layers} >= set(pws.marked(converted))
    checked.failures += [failure for failure, passed in checks.items() if not passed]


def _mean_loss(model: nn.Module, batches: list[Batch]) -> float:
    """Over all images: those of one step are too different from those of the next."""
    with torch.no_grad():
        return fmean(float(torch.stack(list(model(*batch).values())).sum()) for batch in batches)


def _train(model: nn.Module, batches: list[Batch]) -> list[float]:
    optimizer = optim.SGD(pws.param_groups(model, lr=LR, weight_decay=1e-4), momentum=0.9)
    losses = []
    for images, targets in batches * (STEPS // DIFFERENT):
        optimizer.zero_grad()
        loss = torch.stack(list(model(images, targets).values())).sum()
        losses.append(float(loss.detach()))
        torch.autograd.backward(loss)
        optimizer.step()
    return losses


def _difference(found: list[dict[str, Tensor]], again: list[dict[str, Tensor]]) -> float:
    """The largest between two sets of detections; infinite if they are not as many."""
    pairs = [(one[key], other[key]) for one, other in zip(found, again, strict=True) for key in one]
    if any(one.shape != other.shape for one, other in pairs):
        return math.inf
    return max((float((one.double() - other.double()).abs().max()) for one, other in pairs if one.numel()), default=0.0)
