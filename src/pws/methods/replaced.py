"""Modules in the place of those of a model: norms, and convolutions with the same weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from pws._errors import PwsError
from pws.methods.timm_layers import timm_layer
from pws.surgery.norms import has_own_forward, held_by
from pws.surgery.stand_ins import HOOKS
from pws.surgery.standardized import own_filters, set_filters

PLAIN: Final = ("Conv2d", "Conv2dSame")
"""The classes that timm has standardized forms of."""


def replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put each new module at all places of the old one, in place; the model itself may be one."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in new:
                parent._modules[name] = new[child]
    return new.get(model, model)


def in_place_of(norm: nn.Module, new: nn.Module) -> nn.Module:
    """A new norm with the device, dtype, mode and hooks of the old one; behind it the activation that the old one held.

    Raises:
        PwsError: the old one's forward is not that of a known library.
    """
    _check_known(norm)
    tensors = (tensor for tensor in (*norm.parameters(), *norm.buffers()) if tensor.is_floating_point())
    new.to(next(tensors, torch.empty(0)))
    held = held_by(norm)
    return _with_hooks(norm, nn.Sequential(new, *held) if held else new)


def frozen_norm(norm: nn.Module) -> nn.Module:
    """torchvision's FrozenBatchNorm2d, or timm's with an activation, of a BatchNorm's statistics and affine parameters.

    Raises:
        PwsError: the norm is not for images, holds no statistics, or its forward is not that of a known library.
    """
    _check_known(norm)
    freeze = timm_layer("frozen-bn", "norm_act", "freeze_batch_norm_2d")
    statistics = getattr(norm, "running_var", None)
    if not isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm) or statistics is None:
        raise PwsError(
            f"frozen-bn is for BatchNorm2d with running statistics, as in models of images; got {norm!r}. Use bn or gn."
        )
    return _with_hooks(norm, freeze(norm).to(statistics))


def convolution_of_timm(method: str, conv: Any, prefix: str, **settings: Any) -> nn.Module | None:
    """timm's `<prefix>Conv2d` with a convolution's hyper-parameters, weight and bias.

    None for other layers, for filters of one entry, which have no variance, and for padding that timm's layer does not do.
    """
    kind = type(conv).__name__
    if kind not in PLAIN or conv.weight[0].numel() < 2 or conv.padding_mode != "zeros":
        return None
    shape = {key: getattr(conv, key) for key in ("stride", "dilation", "groups")}
    shape |= {"padding": "same" if kind == "Conv2dSame" else conv.padding, "bias": conv.bias is not None}
    build = timm_layer(method, "std_conv", f"{prefix}{kind}")
    new: nn.Module = build(conv.in_channels, conv.out_channels, conv.kernel_size, **shape, **settings)
    new.to(conv.weight).requires_grad_(conv.weight.requires_grad)
    new._parameters.update(conv._parameters)
    return _with_hooks(conv, new)


@torch.no_grad()
def draw(layer: nn.Module) -> None:
    """Draw Kaiming's normal weights for ReLU, and set the bias to 0."""
    filters = own_filters(layer)
    set_filters(layer, torch.empty_like(filters).normal_(std=(2 / filters[0].numel()) ** 0.5))
    if isinstance(bias := layer._parameters.get("bias"), Tensor):
        bias.zero_()


def _check_known(norm: nn.Module) -> None:
    if has_own_forward(norm):
        raise PwsError(
            f"{type(norm).__name__} is a BatchNorm with a forward of its own: what else it does would be lost. Use method bn, "
            "or put another norm there yourself."
        )


def _with_hooks(old: nn.Module, new: nn.Module) -> nn.Module:
    """With the old module's mode and hooks."""
    vars(new).update({key: value for key, value in vars(old).items() if key in HOOKS and value})
    return new.train(old.training)
