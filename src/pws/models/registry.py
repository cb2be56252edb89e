"""Names to networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Final

from torch import nn

from pws._errors import PwsError, UnknownNameError
from pws.methods import Method
from pws.models.allconv import AllConv
from pws.models.resnet import Design, ResNet
from pws.models.stack import Stack

_DEPTHS: Final = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}


def _resnet(depth: int, *, imagenet_stem: bool) -> Callable[..., nn.Module]:
    blocks, bottleneck = _DEPTHS[depth]
    return partial(ResNet, Design(blocks, (64, 128, 256, 512), (1, 2, 2, 2), bottleneck, imagenet_stem))


def _preact(blocks: int) -> Callable[..., nn.Module]:
    return partial(ResNet, Design((blocks,) * 3, (16, 32, 64), (2, 2, 1), True, False, end_norms=False))


def _wide(blocks: int, factor: int) -> Callable[..., nn.Module]:
    """Zagoruyko and Komodakis 2016: WRN-(6 * blocks + 4)-factor."""
    widths = tuple(channels * factor for channels in (16, 32, 64))
    return partial(ResNet, Design((blocks,) * 3, widths, (1, 2, 2), False, False, stem=16))


MODELS: Final[Mapping[str, Callable[..., nn.Module]]] = MappingProxyType(
    {
        "allconv": AllConv,
        "preact": _preact(6),
        **{f"preact{9 * blocks + 2}": _preact(blocks) for blocks in (1, 3, 11)},
        **{f"cifar-resnet{depth}": _resnet(depth, imagenet_stem=False) for depth in (18, 34)},
        **{f"resnet{depth}": _resnet(depth, imagenet_stem=True) for depth in _DEPTHS},
        **{"wrn16-4": _wide(2, 4), "wrn40-4": _wide(6, 4)},
        **{f"stack{depth}": partial(Stack, depth) for depth in (4, 8, 10, 16, 20, 32, 100)},
    }
)
"""Name to builder `(method, in_channels, num_classes, width)`."""


def build_model(
    name: str, method: Method, *, in_channels: int = 3, num_classes: int = 10, width: float = 1.0
) -> nn.Module:
    """The network called `name` with `method`; every number of channels is multiplied by `width`.

    Raises:
        UnknownNameError: no such network.
        PwsError: a count below 1, or a width that is not positive.
    """
    if name not in MODELS:
        raise UnknownNameError("model", name, MODELS)
    if in_channels < 1 or num_classes < 1 or not 0 < width < float("inf"):
        raise PwsError(
            "a network needs at least one input channel, one class and a positive width; got "
            f"in_channels={in_channels}, num_classes={num_classes}, width={width}."
        )
    return MODELS[name](method, in_channels, num_classes, width)
