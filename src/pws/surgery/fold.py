"""A network of pws layers as one of plain layers."""

from __future__ import annotations

from copy import copy, deepcopy

import torch
from torch import nn

from pws.layers import StandardizedLayer
from pws.together import remove_hooks

_OURS = ("alpha", "gamma", "relative_gamma", "gain", "prepared")


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """A copy of `model` in which every pws layer is its parent in torch.nn, with the kernel as its weight.

    It computes the same, costs what an unnormalized network costs, and holds nothing of pws: its parameters load where pws is
    not installed. Everything else is as in `model`, which is left alone: hooks, modes, which layers are shared,
    `requires_grad`. To train on, keep the original: a plain weight is not standardized any more.

    Examples:
        >>> import pws
        >>> fold(pws.Linear(3, 2))
        Linear(in_features=3, out_features=2, bias=True)
    """
    folded: dict[nn.Module, nn.Module] = {}

    def plain(module: nn.Module) -> nn.Module:
        if isinstance(module, StandardizedLayer) and module not in folded:
            folded[module] = plain_layer(module)
        return folded.get(module, module)

    result = deepcopy(model)
    remove_hooks(result)
    for parent in list(result.modules()):
        for name, child in parent._modules.items():
            if child is not None:
                parent._modules[name] = plain(child)
    return plain(result)


def plain_layer(layer: StandardizedLayer) -> nn.Module:
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
    raw = layer._parameters["weight"]
    assert raw is not None
    result._parameters["weight"] = nn.Parameter(layer.kernel(), requires_grad=raw.requires_grad)
    return result
