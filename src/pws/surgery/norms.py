"""Norms that can be taken out, and what each of them is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

Affine = tuple[Tensor, Tensor]
"""Scale and shift per channel."""
_LIBRARIES: Final = ("torch", "torchvision", "timm", "detectron2", "mmcv")
"""Libraries whose norms compute what their family says, with an activation at most, which is a module of its own."""


def _named(*names: str) -> Callable[[nn.Module], bool]:
    """Classes that several libraries have, without a common base."""
    return lambda module: any(cls.__name__ in names for cls in type(module).__mro__)


_is_frozen_class = _named("FrozenBatchNorm2d", "FrozenBatchNormAct2d")

NORMS: Final[dict[str, tuple[Callable[[nn.Module], bool], ...]]] = {
    "batch": (lambda m: isinstance(m, _BatchNorm) and not isinstance(m, _InstanceNorm), _is_frozen_class),
    "group": (lambda m: isinstance(m, nn.GroupNorm) and m.num_groups > 1,),
    "layer": (_named("LayerNorm2d"), lambda m: isinstance(m, nn.GroupNorm) and m.num_groups == 1),
    "instance": (lambda m: isinstance(m, _InstanceNorm),),
}
"""The families of norms that can be taken out."""


def has_own_forward(norm: nn.Module) -> bool:
    """Whether its forward is neither torch's nor that of a known library: it may do more than its family says."""
    library = type(norm).forward.__module__.split(".")[0]
    return "forward" in vars(norm) or library not in _LIBRARIES


def held_by(norm: nn.Module) -> list[nn.Module]:
    """What a module that holds a norm does behind it: the activation of timm's BatchNormAct2d."""
    held = [getattr(norm, part, None) for part in ("drop", "act")]
    return [module for module in held if isinstance(module, nn.Module) and not isinstance(module, nn.Identity)]


def is_frozen(norm: nn.Module) -> bool:
    """Whether no training changes it: statistics and affine parameters are constants."""
    return _is_frozen_class(norm)


def is_trained(norm: nn.Module) -> bool:
    """Whether its running statistics are those of some data; a frozen one's constants always are."""
    mean, variance = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor) or mean.is_meta or is_lazy(mean):
        return False
    return bool(is_frozen(norm) or (mean != 0).any() or (variance != 1).any())


def channels_of(norm: nn.Module) -> int:
    """How many it has."""
    found = getattr(norm, "num_features", getattr(norm, "num_channels", None))
    if found is None:
        found = next(tensor.numel() for tensor in (*norm.parameters(), *norm.buffers()) if tensor.dim() == 1)
    return int(found)


def norm_eps(norm: nn.Module) -> float:
    """What it adds to the variance."""
    return float(getattr(norm, "eps", 1e-5))


def affine_of(norm: nn.Module) -> Affine | None:
    """Scale and shift per channel of a norm in eval mode; None if it has no running statistics."""
    mean, variance = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
        return None
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    scale = (variance + norm_eps(norm)).rsqrt()
    scale = scale * weight.detach() if isinstance(weight, Tensor) else scale
    shift = -mean * scale
    return scale, shift + bias.detach() if isinstance(bias, Tensor) else shift


def scale_and_shift(norm: nn.Module) -> Affine:
    """Those of eval mode; of a norm without running statistics, or with those of no data, its own affine parameters."""
    found = affine_of(norm) if is_trained(norm) else None
    if found is not None:
        return found
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    like = next((t for t in (*norm.parameters(), *norm.buffers()) if t.is_floating_point()), torch.empty(0))
    scale = weight.detach().clone() if isinstance(weight, Tensor) else like.new_ones(channels_of(norm))
    return scale, bias.detach().clone() if isinstance(bias, Tensor) else torch.zeros_like(scale)
