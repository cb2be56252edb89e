"""Methods that normalize the outputs of the convolutions."""

from __future__ import annotations

from typing import Any

from torch import nn

from pws._errors import PwsError
from pws.methods.method import Method, kaiming, plain_conv
from pws.methods.switch_norm import SwitchNorm2d
from pws.methods.timm_layers import timm_layer


def bn() -> Method:
    """Batch Normalization."""
    return Method("bn", "Batch Normalization: Ioffe and Szegedy 2015", plain_conv, norm=nn.BatchNorm2d)


def frozen_bn() -> Method:
    """Batch Normalization whose statistics and affine parameters are constants: those of a trained network."""

    def norm(_: int) -> nn.Module:
        raise PwsError(
            "frozen-bn keeps the statistics of a trained network, and this one starts from random weights. Use it in a model "
            "of others or a detector, with model.backbone; or use bn."
        )

    return Method("frozen-bn", "Batch Normalization, frozen: He et al. 2017 (Mask R-CNN)", plain_conv, norm=norm)


def gn() -> Method:
    """Group Normalization."""
    return Method("gn", "Group Normalization: Wu and He 2018, 32 groups", plain_conv, norm=group_norm)


def groups_of(channels: int) -> int:
    """Groups of a Group Norm: 32 as published. A group of one channel would be Instance Norm, so narrow layers get fewer."""
    return [g for g in range(1, 33) if channels % g == 0 and g <= max(1, channels // 2)][-1]


def group_norm(channels: int) -> nn.Module:
    """Group Normalization with as many groups as `groups_of` says."""
    return nn.GroupNorm(groups_of(channels), channels)


def ln() -> Method:
    """Layer Normalization."""
    source = "Layer Normalization: Ba, Kiros and Hinton 2016, over channels and space"
    return Method("ln", source, plain_conv, norm=one_group)


def one_group(channels: int) -> nn.Module:
    """Layer Normalization of a convolution's output: over channels and space, scale and bias a channel."""
    return nn.GroupNorm(1, channels)


def instance() -> Method:
    """Instance Normalization."""

    def norm(channels: int) -> nn.Module:
        # A group a channel is Instance Norm with scale and bias, and takes outputs of a single position, where torch's
        # InstanceNorm2d raises.
        return nn.GroupNorm(channels, channels)

    return Method("in", "Instance Normalization: Ulyanov, Vedaldi and Lempitsky 2016", plain_conv, norm=norm)


def sn() -> Method:
    """Switchable Normalization."""
    return Method("sn", "Switchable Normalization: Luo et al. 2019", plain_conv, norm=SwitchNorm2d)


def frn() -> Method:
    """Filter Response Normalization; its norm holds the thresholded activation too."""
    norm = timm_layer("frn", "filter_response_norm", "FilterResponseNormTlu2d")
    source = "Filter Response Normalization with TLU: Singh and Krishnan 2020"
    return Method("frn", source, plain_conv, norm=norm, activation=nn.Identity)


def ws() -> Method:
    """Weight Standardization, with the Group Normalization that it was published with."""
    std_conv = timm_layer("ws", "std_conv", "StdConv2d")

    def conv(in_channels: int, out_channels: int, kernel_size: int, **settings: Any) -> nn.Module:
        return kaiming(std_conv(in_channels, out_channels, kernel_size, **settings))

    return Method("ws", "Weight Standardization with Group Norm: Qiao et al. 2019", conv, norm=group_norm)
