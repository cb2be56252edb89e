"""The registry. torch's and timm's own implementations wherever they exist; only PWS is ours."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Protocol

from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import pws
from pws.errors import PwsError, UnknownNameError

Norm = Callable[[int], nn.Module]


class ConvBuilder(Protocol):
    """Builds a 2-d convolution; `bias` tells whether no norm with a bias of its own follows."""

    def __call__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, padding: int = 0, bias: bool
    ) -> nn.Module:
        """The convolution."""


@dataclass(frozen=True)
class Method:
    """One way to normalize a network, or not to."""

    name: str
    source: str
    conv: ConvBuilder
    head: Callable[[int, int], nn.Module]
    """`(in_features, num_classes)` to the last layer."""
    norm: Norm | None = None
    """The norm of every convolution, from the number of channels; None for methods that leave outputs alone."""
    end_norm: Norm | None = None
    """For methods without `norm`: the norm that a deep ResNet keeps behind its stem and in front of its head."""


def _conv(in_channels: int, out_channels: int, kernel_size: int, **settings: Any) -> nn.Module:
    return _kaiming(nn.Conv2d(in_channels, out_channels, kernel_size, **settings))


def _kaiming(conv: nn.Conv2d) -> nn.Conv2d:
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def _none() -> Method:
    return Method("none", "plain convolutions: He et al. 2015 (initialization)", _conv, nn.Linear)


def _bn() -> Method:
    return Method("bn", "Batch Normalization: Ioffe and Szegedy 2015", _conv, nn.Linear, nn.BatchNorm2d)


def _group_norm(channels: int) -> nn.Module:
    # 32 groups as published; a group of a single channel would be Instance Norm, so narrow layers get fewer.
    groups = [g for g in range(1, 33) if channels % g == 0 and g <= max(1, channels // 2)]
    return nn.GroupNorm(groups[-1], channels)


def _gn() -> Method:
    return Method("gn", "Group Normalization: Wu and He 2018, 32 groups", _conv, nn.Linear, _group_norm)


def _wn() -> Method:
    def conv(in_channels: int, out_channels: int, kernel_size: int, **settings: Any) -> nn.Module:
        return _weight_norm(_conv(in_channels, out_channels, kernel_size, **settings))

    def head(in_features: int, num_classes: int) -> nn.Module:
        return _weight_norm(nn.Linear(in_features, num_classes))

    return Method("wn", "Weight Normalization: Salimans and Kingma 2016", conv, head)


def _weight_norm(layer: nn.Module) -> nn.Module:
    normalized: nn.Module = weight_norm(layer)
    return normalized


def _ws() -> Method:
    try:
        from timm.layers.std_conv import StdConv2d
    except ImportError as error:
        raise PwsError("the method ws uses timm's StdConv2d: pip install 'pws-torch[models]'.") from error

    def conv(in_channels: int, out_channels: int, kernel_size: int, **settings: Any) -> nn.Module:
        return _kaiming(StdConv2d(in_channels, out_channels, kernel_size, **settings))

    return Method("ws", "Weight Standardization with Group Norm: Qiao et al. 2019", conv, nn.Linear, _group_norm)


def _pws(*, gain: float | str = "relu", gamma: float = 1e-3, relative_gamma: bool = False) -> Method:
    ours: dict[str, Any] = {"gain": gain, "gamma": gamma, "relative_gamma": relative_gamma}

    def conv(in_channels: int, out_channels: int, kernel_size: int, **settings: Any) -> nn.Module:
        return pws.Conv2d(in_channels, out_channels, kernel_size, **settings, **ours)

    def head(in_features: int, num_classes: int) -> nn.Module:
        return pws.Linear(in_features, num_classes, **ours)

    def one_group(channels: int) -> nn.Module:
        return nn.GroupNorm(1, channels)

    return Method("pws", "Parametric Weights Standardization: Liu et al. 2021", conv, head, end_norm=one_group)


METHODS: Final = MappingProxyType({"none": _none, "bn": _bn, "gn": _gn, "wn": _wn, "ws": _ws, "pws": _pws})
"""Name to builder; a builder's keywords are the method's options."""


def build_method(name: str, **options: Any) -> Method:
    """The method called `name`; `pws` takes the options `gain`, `gamma` and `relative_gamma`.

    Raises:
        UnknownNameError: no such method.
        PwsError: an option the method does not have.
    """
    if name not in METHODS:
        raise UnknownNameError("method", name, METHODS)
    builder: Callable[..., Method] = METHODS[name]
    known = inspect.signature(builder).parameters
    for option in options:
        if option not in known:
            raise PwsError(
                f"the method {name} has no option {option!r}; it has: {', '.join(known) or 'none'}. "
                "Leave the option out, or choose the method it belongs to."
            )
    return builder(**options)
