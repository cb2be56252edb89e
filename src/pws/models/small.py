"""Models of torchvision for small images: `--model.name pws.models.small:resnet18`."""

from __future__ import annotations

from torch import nn
from torchvision import models


def resnet18(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """torchvision's ResNet-18 with a 3x3 stem of stride 2 and no pooling behind it."""
    model: nn.Module = models.resnet18(num_classes=num_classes)
    model.conv1 = stem = nn.Conv2d(in_channels, 64, 3, stride=2, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model
