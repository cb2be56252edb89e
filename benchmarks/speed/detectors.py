"""The compared detectors: built as `pws train` builds them, on scenes of digits."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from pws.methods import build_method
from pws.training.detect.data import DetectionData
from pws.training.detect.network import Example, detector_for, examples_of
from pws.training.recipe import DataConfig, ModelConfig

SMALLEST_ANCHOR: Final = 16
PIXELS: Final = 160
"""Where only the weights count."""


def detector(model: str, method: str, width: float, pixels: int = PIXELS) -> nn.Module:
    """The detector with `method`, for images of `pixels`."""
    torch.manual_seed(0)
    config = ModelConfig(name=model, method=method, width=width, anchor_size=SMALLEST_ANCHOR)
    return detector_for(config, _scenes(pixels), build_method(method))


def scenes(pixels: int, batch: int, device: torch.device) -> Example:
    """Images and their objects."""
    images, targets = examples_of(_scenes(pixels))
    chosen = [number % len(images) for number in range(batch)]
    return [images[n].to(device) for n in chosen], [{k: v.to(device) for k, v in targets[n].items()} for n in chosen]


def loss_of(parts: dict[str, Tensor]) -> Tensor:
    """The sum of a detector's losses."""
    return torch.stack(list(parts.values())).sum()


def _scenes(pixels: int) -> DetectionData:
    return DetectionData(DataConfig(name="digit-scenes", image_size=pixels, validation=0), seed=0)
