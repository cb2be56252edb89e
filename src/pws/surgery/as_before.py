"""A converted network in the architecture that it had before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pws._errors import PwsError
from pws.surgery.copying import copy_of
from pws.surgery.norms import norm_eps
from pws.surgery.stand_ins import Affine, layer_before


@torch.no_grad()
def as_before(folded: nn.Module, like: nn.Module) -> nn.Module:
    """A copy of `like` that computes in eval mode what `folded` does."""
    result = copy_of(like).eval()
    modules, new = dict(result.named_modules()), dict(folded.named_modules())
    gone = [name for name, module in modules.items() if name in new and type(new[name]) is not type(module)]
    inside = tuple(f"{name}." for name in gone)
    behind = {layer: modules[name] for name in gone if (layer := layer_before(new[name]))}
    for name in gone:
        _neutralize(name, modules[name], new[name])
    for name, module in modules.items():
        if name not in gone and not name.startswith(inside):
            if name not in new:
                raise _is_other(f"{name!r} is missing in the converted model")
            _take(name, module, new[name], behind.get(name))
    return result


def _take(name: str, module: nn.Module, new: nn.Module, norm: nn.Module | None) -> None:
    """The parameters and buffers of one module; its bias goes into the norm behind it, if it had none."""
    values = {**new._parameters, **new._buffers}
    for key, old in (*module._parameters.items(), *module._buffers.items()):
        value = values.get(key)
        if old is None and value is not None and isinstance(shift := getattr(norm, "bias", None), Tensor):
            shift.copy_(value)
        elif old is None or value is None:
            module._parameters[key] = None if value is None else nn.Parameter(value.detach().clone())
        elif old.shape != value.shape:
            raise _is_other(f"{key} of {name!r} has shape {tuple(value.shape)}, not {tuple(old.shape)}")
        else:
            old.copy_(value)


def _neutralize(name: str, norm: nn.Module, stand_in: nn.Module) -> None:
    """A norm that gives in eval mode what stands in its place."""
    parts: Any = norm
    if not isinstance(getattr(norm, "running_var", None), Tensor):
        raise PwsError(
            f"fold(like=...) needs norms that can do nothing, by their running statistics; {name!r} is a "
            f"{type(norm).__name__} without. Fold without like=."
        )
    affine = next((module for module in stand_in.modules() if isinstance(module, Affine)), None)
    scale = torch.ones_like(parts.running_var) if affine is None else affine.weight
    shift = torch.zeros_like(parts.running_mean) if affine is None else affine.bias
    if isinstance(parts.weight, Tensor):
        parts.weight.copy_(scale)
        parts.bias.copy_(shift)
        scale, shift = torch.ones_like(scale), torch.zeros_like(shift)
    parts.running_mean.copy_(-shift / scale)
    parts.running_var.copy_(scale.square().reciprocal() - norm_eps(norm))


def _is_other(what: str) -> PwsError:
    return PwsError(f"like= must be the model as it was before the conversion: {what}. Build it as you did then.")
