"""The detector of a recipe: built, given its method, its backbone's weights and its calibration."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from pws._errors import PwsError, memory_ran_out, one_line
from pws.methods import Method, apply_method
from pws.models import model_of
from pws.models.detector_spec import DetectorSpec
from pws.models.detectors import build_detector, hidden_layers, resize_to
from pws.surgery import calibrate
from pws.surgery.running import branches_run
from pws.training.detect.backbone import freeze_stages, load_backbone, stages_trained
from pws.training.detect.data import DetectionBatches, DetectionData
from pws.training.detect.paper import as_published
from pws.training.detect.samples import Target
from pws.training.network import check_classes, method_options
from pws.training.recipe import ModelConfig

EXAMPLES: Final = 8
"""Training images with objects that a method sets its scales on."""
TRIED: Final = 64
"""Training images looked at for them."""
IMAGE_SIZE: Final = 800
SSD_SIZE: Final = 320

Example = tuple[list[Tensor], list[Target]]


def detector_for(config: ModelConfig, data: DetectionData, method: Method) -> nn.Module:
    """The recipe's detector for this data, checked on a few images.

    Raises:
        PwsError: another number of classes, an unknown name, an option of another method or detector, images of a size that it
            can't take, or a backbone's run of another network.
    """
    check_classes(config, data.splits.classes)
    example = examples_of(data)
    model = _with_method(_built(config, data), config, method, example)
    if config.backbone is not None:
        load_backbone(model, config)
        if method.name.startswith("pws"):
            calibrate(model, [example], only=lambda name, _: not name.startswith("backbone.body"))
    freeze_stages(model, stages_trained(config))
    _check_runs(config, model, example)
    return model.train()


def _built(config: ModelConfig, data: DetectionData) -> nn.Module:
    """With BatchNorm, and random weights."""
    size, classes = data.config.image_size, len(data.splits.classes)
    if ":" in config.name:
        model: nn.Module = model_of(config.name, num_classes=classes + 1)
        if size is not None:
            resize_to(model, size)
        return model
    spec = DetectorSpec(
        num_classes=classes,
        image_size=size or (SSD_SIZE if config.name.startswith("ssd") else IMAGE_SIZE),
        width=config.width,
        head=config.head,
        anchor_size=config.anchor_size,
        keypoints=len(data.splits.train.keypoint_names),
        options=config.options,
    )
    model = build_detector(config.name, spec)
    if config.name.startswith("mask") and not data.splits.train.has_masks:
        raise PwsError(f"Mask R-CNN needs data with masks, and {data.config.name} has boxes alone. Use faster-rcnn.")
    return model


def _with_method(model: nn.Module, config: ModelConfig, method: Method, example: Example) -> nn.Module:
    options = method_options(config)
    if method.name == "pws-paper" and not options:
        return as_published(model, config.name.rpartition("-")[0], example)
    if method.name == "pws" and hasattr(model, "backbone"):
        options["standardize"] = hidden_layers(model)
    return apply_method(model, method.name, example, **options)


def examples_of(data: DetectionData) -> Example:
    """Training images with objects, spread over all."""
    images = data.splits.train
    batches = DetectionBatches(images, data.seed, crowds=False)
    step = max(1, len(images) // TRIED)
    found: list[tuple[Tensor, Target]] = []
    for number in range(0, len(images), step):
        (image,), (target,) = batches[0, [number]]
        if len(target["boxes"]):
            found.append((image, target))
        if len(found) == EXAMPLES:
            break
    if not found:
        raise PwsError(
            f"no object in {TRIED} training images of {data.config.name}, spread over all: a detector learns nothing from "
            "them. Check the annotations."
        )
    return [image for image, _ in found], [target for _, target in found]


@torch.no_grad()
def _check_runs(config: ModelConfig, model: nn.Module, example: Example) -> None:
    images, targets = example
    try:
        with branches_run(model):  # leaves statistics and random numbers alone
            model(images[:2], targets[:2])
    except (RuntimeError, AssertionError, ValueError) as error:
        if memory_ran_out(error):
            raise
        raise PwsError(
            f"{config.name} can't take these images ({one_line(error)}). Set another --data.image_size."
        ) from error
