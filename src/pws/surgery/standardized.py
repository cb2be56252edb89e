"""A layer of torch.nn, or of a subclass, that is standardized: marked, or made a pws layer in place."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn

from pws._errors import PwsError
from pws._layers import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    Linear,
    StandardizedLayer,
)
from pws._mark import Mark, adopt, filters_of, mark, mark_of
from pws._standardize import standardize

PARENTS: Final[dict[type[nn.Module], type[StandardizedLayer]]] = {
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    nn.ConvTranspose1d: ConvTranspose1d,
    nn.ConvTranspose2d: ConvTranspose2d,
    nn.ConvTranspose3d: ConvTranspose3d,
    nn.Linear: Linear,
}


class ReadsKernel(StandardizedLayer):
    """For subclasses of torch's layers, whose own forward reads `self.weight`: it reads the kernel there.

    To all others `weight` is the raw weight, as in every pws layer, so that pruning, parametrizations and replicas work.
    """

    def filters(self) -> Tensor:
        """The raw weight with one filter an entry of the leading dimension."""
        return filters_of(self, self.weight)

    def kernel(self) -> Tensor:
        """The standardized weight, in the shape of the raw one."""
        return filters_of(self, super().kernel())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The subclass's own, of a plain layer with the kernel as its weight."""
        kind = plain_class(self)
        plain: Any = kind.__new__(kind)
        parameters = {name: value for name, value in self._parameters.items() if name != "weight"}
        plain.__dict__ = {**self.__dict__, "_parameters": parameters, "weight": self.kernel()}
        return plain.forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self).__bases__[1],), self.__dict__


def plain_class(layer: StandardizedLayer) -> type[nn.Module]:
    """The class that it would have without pws."""
    parents = (cls for cls in type(layer).__mro__ if issubclass(cls, nn.Module))
    return next(cls for cls in parents if not issubclass(cls, StandardizedLayer))


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


def is_standardized(module: nn.Module) -> bool:
    """Whether it is a pws layer or a marked one."""
    return isinstance(module, StandardizedLayer) or mark_of(module) is not None


@torch.no_grad()
def standardize_layer(layer: nn.Module, *, gain: float, gamma: float, relative_gamma: bool, bias: bool) -> None:
    """Mark `layer` and make its weight the kernel of alpha 1. It gets a bias of 0 if it has none and `bias` is true."""
    mark(layer, gain=gain, gamma=gamma, relative_gamma=relative_gamma)
    filters = own_filters(layer)
    # Under autocast the kernel would be rounded.
    with nullcontext() if filters.is_meta else torch.autocast(filters.device.type, enabled=False):
        set_filters(layer, standardize(filters, gain=gain, gamma=gamma, relative_gamma=relative_gamma))
    if bias:
        add_bias(layer)


@torch.no_grad()
def to_layers(model: nn.Module) -> None:
    """Make each marked layer of a model a pws layer with the same kernel, in place, and take its mark off.

    Raises:
        PwsError: a marked layer's weight is computed from other parameters; nothing is changed then.
    """
    # All are adopted before the first changes: layers may share a weight.
    marks = {layer: found for layer in model.modules() if (found := mark_of(layer)) is not None}
    adopted = {layer: adopt(own_filters(layer), found) for layer, found in marks.items()}
    for layer, (filters, alpha) in adopted.items():
        _to_layer(layer, marks[layer], filters, alpha)


def _to_layer(layer: nn.Module, found: Mark, filters: Tensor, alpha: Tensor) -> None:
    parent = parent_of(layer)
    assert parent is not None
    weight = own_weight(layer)
    del layer.pws
    layer.__class__ = PARENTS[parent] if type(layer) is parent else _subclass(type(layer))
    assert isinstance(layer, StandardizedLayer)
    layer.gain, layer.gamma, layer.relative_gamma = found.gain, found.gamma, found.relative_gamma
    layer.alpha = nn.Parameter(alpha.to(weight.dtype), requires_grad=weight.requires_grad)
    set_filters(layer, filters)


def add_bias(layer: nn.Module) -> None:
    """Give a layer without a bias one of 0."""
    weight = own_weight(layer)
    if layer._parameters["bias"] is None:
        zeros = weight.new_zeros(len(own_filters(layer)))
        layer.bias = nn.Parameter(zeros, requires_grad=weight.requires_grad)


def own_weight(layer: nn.Module) -> nn.Parameter:
    """The weight that a plain or a pws layer holds: the kernel of a plain one, the raw weight of a pws layer.

    Raises:
        PwsError: it is computed from other parameters.
    """
    weight = layer._parameters.get("weight")
    if weight is None:
        raise is_computed(layer)
    return weight


def is_computed(layer: nn.Module) -> PwsError:
    """The error about a layer whose weight is no parameter."""
    return PwsError(
        f"a standardized layer holds its weight and bias as parameters; a {type(layer).__name__} of this model computes one "
        "from others. Pruning, weight norm or another parametrization does this: make it permanent first, by "
        'torch.nn.utils.prune.remove(layer, "weight") or '
        'torch.nn.utils.parametrize.remove_parametrizations(layer, "weight").'
    )


def varies(filters: Tensor) -> bool:
    """Whether more than rounding is left of any filter when its mean is taken out."""
    centred = filters - filters.mean(tuple(range(1, filters.dim())), keepdim=True)
    # NaN is for others to find.
    return not bool((centred.abs() <= 8 * torch.finfo(filters.dtype).eps * filters.abs().max()).all())


def own_filters(layer: nn.Module) -> Tensor:
    """`own_weight` with one filter an entry of the leading dimension."""
    return filters_of(layer, own_weight(layer))


@torch.no_grad()
def set_filters(layer: nn.Module, filters: Tensor) -> None:
    """The inverse of `own_filters`."""
    own_weight(layer).copy_(filters_of(layer, filters))
