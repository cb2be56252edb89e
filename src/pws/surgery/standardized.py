"""A layer of torch.nn, or of a subclass, made a pws layer in place."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from pws.layers import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    Linear,
    StandardizedLayer,
)
from pws.standardize import swap_channels

PARENTS: Final[dict[type[nn.Module], type[StandardizedLayer]]] = {
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    nn.ConvTranspose1d: ConvTranspose1d,
    nn.ConvTranspose2d: ConvTranspose2d,
    nn.ConvTranspose3d: ConvTranspose3d,
    nn.Linear: Linear,
}
TRANSPOSED: Final = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class ReadsKernel(StandardizedLayer):
    """For subclasses of torch's layers, whose own forward reads `self.weight`: it reads as the kernel.

    The parameter behind it, which optimizers and checkpoints see, is the raw weight as in every pws layer.
    """

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The standardized weight."""
        return self.kernel()

    def filters(self) -> Tensor:
        """The raw weight with one filter an entry of the leading dimension."""
        return filters_of(self)

    def kernel(self) -> Tensor:
        """The standardized weight, in the shape of the raw one."""
        return swapped(self, super().kernel())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self).__bases__[1],), self.__dict__


_made: dict[type[nn.Module], type[nn.Module]] = {}


def _subclass(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _made:
        _made[kind] = type(f"Standardized{kind.__name__}", (ReadsKernel, kind), {})
    return _made[kind]


def _rebuild(kind: type[nn.Module]) -> nn.Module:
    made = _subclass(kind)
    return made.__new__(made)


def parent_of(layer: nn.Module) -> type[nn.Module] | None:
    """The class of torch.nn that `layer` is, or is a subclass of; None for other modules."""
    return next((cls for cls in type(layer).__mro__ if cls in PARENTS), None)


def standardize_layer(layer: nn.Module, *, gain: float, gamma: float, relative_gamma: bool, bias: bool) -> None:
    """Make `layer` a pws layer: its weight as the raw weight, alpha 1, and a bias of 0 if it has none and `bias` is true."""
    parent = parent_of(layer)
    assert parent is not None
    weight = layer._parameters["weight"]
    assert weight is not None
    layer.__class__ = PARENTS[parent] if type(layer) is parent else _subclass(type(layer))
    assert isinstance(layer, StandardizedLayer)
    layer.gain, layer.gamma, layer.relative_gamma = gain, gamma, relative_gamma
    if bias:
        add_bias(layer)
    layer.alpha = nn.Parameter(weight.new_ones(len(filters_of(layer))), requires_grad=weight.requires_grad)


def add_bias(layer: nn.Module) -> None:
    """Give a layer without a bias one of 0."""
    weight = layer._parameters["weight"]
    assert weight is not None
    if layer._parameters["bias"] is None:
        zeros = weight.new_zeros(len(filters_of(layer)))
        layer.bias = nn.Parameter(zeros, requires_grad=weight.requires_grad)


def filters_of(layer: nn.Module) -> Tensor:
    """The raw weight of a plain or a pws layer with one filter an entry of the leading dimension."""
    weight = layer._parameters["weight"]
    assert weight is not None
    return swapped(layer, weight)


@torch.no_grad()
def set_filters(layer: nn.Module, filters: Tensor) -> None:
    """The inverse of `filters_of`."""
    weight = layer._parameters["weight"]
    assert weight is not None
    weight.copy_(swapped(layer, filters))


def swapped(layer: nn.Module, tensor: Tensor) -> Tensor:
    """From the shape of the layer's weight to that of its filters, or back: the same, but for a transposed convolution."""
    return swap_channels(tensor, int(layer.groups)) if isinstance(layer, TRANSPOSED) else tensor
