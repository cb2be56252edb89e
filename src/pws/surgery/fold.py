"""A standardized network as one of plain layers."""

from __future__ import annotations

from copy import copy

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from pws.layers import StandardizedLayer
from pws.mark import unmark
from pws.surgery.copying import copy_of
from pws.surgery.standardized import is_computed, own_weight

_OURS = ("alpha", "gamma", "relative_gamma", "gain")


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """A copy of `model` without its marks, in which every pws layer is its parent in torch.nn, with the kernel as its weight.

    It computes the same, costs what an unnormalized network costs, and holds nothing of pws: it loads where pws is not
    installed. Everything else is as in `model`, which is left alone: hooks, modes, which layers are shared,
    `requires_grad`. To train on, keep the original: no optimizer standardizes a weight without a mark.

    Raises:
        PwsError: a pws layer's weight is computed from other parameters (pruning, weight norm), or the model can't be copied.

    Examples:
        >>> import pws
        >>> fold(pws.Linear(3, 2))
        Linear(in_features=3, out_features=2, bias=True)
    """
    for module in model.modules():
        if isinstance(module, StandardizedLayer) and (is_parametrized(module) or "weight" not in module._parameters):
            raise is_computed(module)
    result = copy_of(model)
    unmark(result)
    folded: dict[nn.Module | None, nn.Module] = {
        module: _plain(module) for module in result.modules() if isinstance(module, StandardizedLayer)
    }
    for parent in list(result.modules()):
        for name, child in parent._modules.items():
            if child in folded:
                parent._modules[name] = folded[child]
    return folded.get(result, result)


def _plain(layer: StandardizedLayer) -> nn.Module:
    """A copy of `layer` that is its parent in torch.nn; hooks and other parameters are the same."""
    parents = (
        cls for cls in type(layer).__mro__ if issubclass(cls, nn.Module) and not issubclass(cls, StandardizedLayer)
    )
    result: nn.Module = copy(layer)
    result.__class__ = next(parents)
    vars(result).update({key: copy(value) for key, value in vars(layer).items() if isinstance(value, dict)})
    for name in _OURS:
        result._parameters.pop(name, None)
        vars(result).pop(name, None)
    frozen = not own_weight(layer).requires_grad
    result._parameters["weight"] = nn.Parameter(layer.kernel(), requires_grad=not frozen)
    return result
