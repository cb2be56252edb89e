"""Backbones of detectors: torchvision's classifiers with a feature pyramid (FPN) on their stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from torch import nn
from torchvision import models as tv
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    FeaturePyramidNetwork,
    LastLevelMaxPool,
    LastLevelP6P7,
)

RESNETS: Final = ("resnet18", "resnet34", "resnet50")
MOBILENET: Final = "mobilenetv3"
BACKBONES: Final = (*RESNETS, MOBILENET)


class Pyramid(nn.Module):
    """A backbone's stages and the FPN on them, as torchvision's `BackboneWithFPN`, of any number of channels."""

    def __init__(self, body: nn.Module, stages: dict[str, int], channels: int, extra: ExtraFPNBlock) -> None:
        super().__init__()
        self.body = IntermediateLayerGetter(body, {stage: str(level) for level, stage in enumerate(stages)})
        self.fpn = FeaturePyramidNetwork(list(stages.values()), channels, extra, nn.BatchNorm2d)
        self.out_channels = channels

    def forward(self, images: Any) -> Any:
        """Maps by level."""
        return self.fpn(self.body(images))


@dataclass(frozen=True)
class Levels:
    """A backbone, and how many maps it gives."""

    backbone: nn.Module
    levels: int


def fpn_backbone(name: str, channels: int, *, dense: bool) -> Levels:
    """A backbone of `BACKBONES` with a pyramid of `channels` channels, random weights.

    R-CNNs take the maps of stride 4 to 32 and a pooled one. Dense detectors (RetinaNet, FCOS) leave out stride 4 and add two
    strided convolutions.
    """
    stages = _resnet_stages(name, dense=dense) if name in RESNETS else _mobilenet_stages(dense=dense)
    body, channels_of = stages
    extra = LastLevelP6P7(channels, channels) if dense else LastLevelMaxPool()
    return Levels(Pyramid(body, channels_of, channels, extra), len(channels_of) + (2 if dense else 1))


def _resnet_stages(name: str, *, dense: bool) -> tuple[nn.Module, dict[str, int]]:
    builder: Callable[..., Any] = getattr(tv, name)
    body = builder(weights=None)
    width = body.fc.in_features
    stages = {f"layer{stage}": width // 2 ** (4 - stage) for stage in (1, 2, 3, 4)}
    return body, dict(list(stages.items())[dense:])


def _mobilenet_stages(*, dense: bool) -> tuple[nn.Module, dict[str, int]]:
    """The last block of each stride."""
    features = tv.mobilenet_v3_large(weights=None).features
    strided = [number for number, block in enumerate(features) if getattr(block, "_is_cn", False)]
    ends = [*(number - 1 for number in strided[1:]), len(features) - 1]
    return features, {str(number): features[number].out_channels for number in ends[dense:]}
