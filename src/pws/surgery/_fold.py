"""A standardized network as one of plain layers."""

from __future__ import annotations

from copy import copy

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from pws._errors import PwsError
from pws._layers import StandardizedLayer
from pws._mark import unmark
from pws.surgery.as_before import as_before
from pws.surgery.copying import copy_of
from pws.surgery.standardized import PARENTS, ReadsKernel, is_computed, own_weight, plain_class

_OURS = ("alpha", "gamma", "relative_gamma", "gain")


@torch.no_grad()
def fold(model: nn.Module, *, like: nn.Module | None = None) -> nn.Module:
    """Make a copy of `model` without its marks, in which every pws layer is a plain layer with the kernel as its weight.

    It computes the same, and costs what a network without normalization costs. It loads where pws is not installed, unless a
    conversion left a scale or a copy where a norm was. Everything else is as in `model`, which is left alone: hooks, modes,
    which layers are shared, `requires_grad`. To train on, keep the original: no optimizer standardizes a weight without a mark.

    Args:
        model: a model with marked layers or pws layers.
        like: the model as it was before its conversion. The result is a copy of this with the weights of `model`, in eval mode.
            Its norms change nothing (mean 0, variance 1), so its own loaders, exporters and `fuse()` work. A bias that the
            conversion gave a layer goes into the norm right behind it. Without such a norm, the layer has it.

    Raises:
        PwsError: a pws layer's weight is computed from other parameters (pruning, weight norm), or its class has a forward of
            its own. Or the model can't be copied, or `like` is of another architecture.

    Examples:
        >>> import pws
        >>> fold(pws.Linear(3, 2))
        Linear(in_features=3, out_features=2, bias=True)
    """
    for module in model.modules():
        if isinstance(module, StandardizedLayer):
            _check(module)
    result = copy_of(model)
    unmark(result)
    folded: dict[nn.Module | None, nn.Module] = {
        module: _plain(module) for module in result.modules() if isinstance(module, StandardizedLayer)
    }
    for parent in list(result.modules()):
        for name, child in parent._modules.items():
            if child in folded:
                parent._modules[name] = folded[child]
    plain = folded.get(result, result)
    return plain if like is None else as_before(plain, like)


def _check(layer: StandardizedLayer) -> None:
    if is_parametrized(layer) or "weight" not in layer._parameters:
        raise is_computed(layer)
    if not isinstance(layer, ReadsKernel) and not any(type(layer).forward is cls.forward for cls in PARENTS.values()):
        raise PwsError(
            f"fold makes a pws layer the layer of torch.nn that it is a subclass of; a {type(layer).__name__} has a forward of "
            "its own, which would be lost. Do what it does beside the layer in a module around it, or mark a plain layer "
            "(pws.mark) in its place."
        )


def _plain(layer: StandardizedLayer) -> nn.Module:
    """A copy of `layer` that is its parent in torch.nn; hooks and other parameters are the same."""
    result: nn.Module = copy(layer)
    result.__class__ = plain_class(layer)
    vars(result).update({key: copy(value) for key, value in vars(layer).items() if isinstance(value, dict)})
    for name in _OURS:
        result._parameters.pop(name, None)
        vars(result).pop(name, None)
    frozen = not own_weight(layer).requires_grad
    result._parameters["weight"] = nn.Parameter(layer.kernel(), requires_grad=not frozen)
    return result
