"""The paper's SSD on VGG-16 (no dilated convolution, no L2 norm) and torchvision's SSDlite, for images of any size."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from torch import Tensor, nn
from torchvision.models import detection as tvd
from torchvision.models import vgg
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.ops.misc import Conv2dNormActivation

from pws._errors import PwsError
from pws.models.detector_spec import DetectorSpec

SMALLEST: Final = 64
"""Pixels per side of an image that leaves three maps."""


class SSDFeatures(nn.Module):
    """VGG-16 to conv4_3 (stride 8), to conv7 (stride 16), then blocks of a 1x1 and a 3x3 convolution, each a map."""

    def __init__(self, image_size: int, width: float) -> None:
        super().__init__()
        layers = vgg.make_layers([v if v == "M" else _scaled(int(v), width) for v in vgg.cfgs["D"]], batch_norm=True)
        pools = [number for number, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
        layers[pools[2]].ceil_mode = True  # as SSD: 300 pixels give maps of 38, not of 37
        deep, deeper, side = _scaled(512, width), _scaled(1024, width), -(-(image_size // 4) // 2)
        fc = [_block(deep, deeper, 3), _block(deeper, deeper, 1)]
        maps = [layers[: pools[3]], nn.Sequential(*layers[pools[3] : -1], nn.MaxPool2d(3, 1, 1), *fc)]
        self.out_channels, channels, side = [deep, deeper], deeper, side // 2
        while side > 2:
            out = _scaled(512 if len(maps) == 2 else 256, width)
            strided = side > 5
            last = Conv2dNormActivation(out // 2, out, 3, *((2, 1) if strided else (1, 0)))
            maps.append(nn.Sequential(_block(channels, out // 2, 1), last))
            channels, side = out, (side + 1) // 2 if strided else side - 2
            self.out_channels.append(out)
        self.maps = nn.ModuleList(maps)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Maps by level."""
        found = OrderedDict[str, Tensor]()
        for level, layers in enumerate(self.maps):
            images = layers(images)
            found[str(level)] = images
        return found


def _block(in_channels: int, out_channels: int, kernel_size: int) -> nn.Module:
    block: nn.Module = Conv2dNormActivation(in_channels, out_channels, kernel_size)
    return block


def _scaled(channels: int, width: float) -> int:
    return max(8, round(channels * width))


def build_ssd(_: str, spec: DetectorSpec) -> nn.Module:
    """SSD with default boxes of SSD300's scales."""
    if spec.image_size < SMALLEST:
        raise PwsError(
            f"SSD needs images of {SMALLEST} pixels or more per side; got data.image_size {spec.image_size}."
        )
    backbone = SSDFeatures(spec.image_size, spec.width)
    levels = len(backbone.out_channels)
    scales = [0.07, *(0.15 + 0.72 * level / max(1, levels - 2) for level in range(levels - 1)), 1.05]
    boxes = DefaultBoxGenerator([[2], *[[2, 3]] * (levels - 3), [2], [2]], scales=scales)
    size = (spec.image_size, spec.image_size)
    model: nn.Module = SSD(backbone, boxes, size, spec.num_classes + 1, **spec.options)
    return model


def build_ssdlite(_: str, spec: DetectorSpec) -> nn.Module:
    """torchvision's SSDlite on MobileNetV3, whose images are resized to squares of another size; it has one width."""
    if spec.width != 1:
        raise PwsError(f"SSDlite is built as torchvision has it, at model.width 1; got {spec.width:g}.")
    options = dict(spec.options)
    model: nn.Module = tvd.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=spec.num_classes + 1, **options
    )
    size = spec.image_size
    vars(model.transform).update(fixed_size=(size, size), min_size=(size,), max_size=size)
    return model
