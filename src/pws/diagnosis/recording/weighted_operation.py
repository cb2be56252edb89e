"""One call of an operation with a weight: a convolution, a transposed convolution or a linear map.

A layer is known by the operation that it calls, not by its class: whatever computes the kernel (weight norm, a
standardized layer of any library) or pads the input, the operation is called with the kernel and the input that count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pws._standardize import swap_channels

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_SIGNATURES: Final[Mapping[Callable[..., Tensor], tuple[str, ...]]] = {
    F.linear: ("input", "weight", "bias"),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _CONV),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _TRANSPOSED),
}
"""The operations with a weight, and their arguments in order."""


@dataclass(frozen=True)
class Layout:
    """Where an operation's channels and filters are."""

    channel_dim: int
    groups: int
    transposed: bool

    def filters(self, kernel: Tensor) -> Tensor:
        """A tensor of the kernel's shape as `(out_channels, fan_in)`."""
        return (swap_channels(kernel, self.groups) if self.transposed else kernel).flatten(1)


@dataclass(frozen=True)
class Call:
    """An operation with its input, its kernel (in the operation's own shape) and its other arguments."""

    function: Callable[..., Tensor]
    input: Tensor
    kernel: Tensor
    bias: Tensor | None
    settings: dict[str, Any]

    @property
    def transposed(self) -> bool:
        """Whether the kernel holds the input's channels first."""
        return _SIGNATURES[self.function] is _TRANSPOSED

    @property
    def channel_dim(self) -> int:
        """The dimension of the channels, counted from the end: inputs may come without a batch."""
        return 1 - self.kernel.dim()

    @property
    def groups(self) -> int:
        """Groups of channels that do not meet."""
        return int(self.settings.get("groups", 1))

    def run(self) -> Tensor:
        """The operation's result."""
        return self.function(self.input, self.kernel, self.bias, **self.settings)

    @property
    def layout(self) -> Layout:
        """What is left of a call without its tensors."""
        return Layout(self.channel_dim, self.groups, self.transposed)

    def filters(self, kernel: Tensor) -> Tensor:
        """A tensor of the kernel's shape as `(out_channels, fan_in)`."""
        return self.layout.filters(kernel)

    def patch_average(self) -> Tensor:
        """`xbar`: at each position of the output, the average of the entries that a filter meets there, one channel per group.

        It is the layer's own operation with the constant kernel 1 / n, so stride, padding, dilation and transposition are
        right. It runs on the sum of each group's channels, which is the same and cheaper.
        """
        x = self.input.to(torch.promote_types(self.input.dtype, torch.float32))
        groups, channels = self.groups, self.channel_dim
        summed = split_channels(x, channels, groups).sum(channels)
        ones = torch.ones(groups, 1, *self.kernel.shape[2:], dtype=x.dtype, device=x.device)
        fan_in = self.filters(self.kernel).shape[1]
        return self.function(summed, ones, None, **self.settings) / fan_in


def split_channels(signal: Tensor, channel_dim: int, groups: int) -> Tensor:
    """The channels as two dimensions, group and channel of the group; the second is where `channel_dim`, from the end, was."""
    shape = list(signal.shape)
    shape[channel_dim : channel_dim + 1 or None] = [groups, shape[channel_dim] // groups]
    return signal.reshape(shape)


def call_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    """The call that `function(*args, **kwargs)` makes, None if it is no operation with a weight."""
    names = _SIGNATURES.get(function)
    if names is None:
        return None
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    settings = {name: given[name] for name in names[3:] if name in given}
    call = Call(function, given["input"], given["weight"], given.get("bias"), settings)
    return call if call.kernel.dim() > 1 else None


class Operations(TorchFunctionMode):
    """Hands every operation with a weight to `handler`."""

    def __init__(self, handler: Callable[[Call], Tensor]) -> None:
        super().__init__()
        self.handler = handler

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = call_of(function, args, kwargs or {})
        return function(*args, **(kwargs or {})) if call is None else self.handler(call)
