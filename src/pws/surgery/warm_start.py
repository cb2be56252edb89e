"""A converted model that computes nearly what the trained one did.

In eval mode a BatchNorm is a scale and a shift a channel. Right behind a layer they are taken over by its alpha and bias;
elsewhere they stay, as a depthwise 1x1 convolution. Centring a filter `w` loses `m sum(x)`, the patch's sum times the filter's
mean `m`: alpha and bias are fitted by least squares, channel by channel and in the order of execution, to what the trained
layer gave on the example, so that the bias makes up for the mean of what is lost, and alpha for its correlation with the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pws.diagnosis.batch import tensors_in
from pws.layers import StandardizedLayer
from pws.surgery.calibrate import evaluated, hooked

Forward = Callable[[nn.Module], Any]
Affine = tuple[Tensor, Tensor]
"""Scale and shift a channel."""


@torch.no_grad()
def match(original: nn.Module, converted: nn.Module, targets: Mapping[str, Affine | None], forward: Forward) -> None:
    """Fit alpha and bias of the layers of `converted`.

    Args:
        original: the trained model.
        converted: its copy, with standardized layers.
        targets: name of each layer to fit, to the scale and shift that its output in `original` went through.
        forward: runs a model on the example.
    """
    wanted: dict[str, Tensor] = {}
    names = {original.get_submodule(name): name for name in targets}

    def record(module: nn.Module, _: object, output: Tensor) -> None:
        affine = targets[names[module]]
        weight: Any = module.weight
        channel_last = output.movedim(1 - weight.dim(), -1)
        # A copy in any case: an activation in place may follow.
        target = channel_last.clone() if affine is None else channel_last * affine[0] + affine[1]
        wanted.setdefault(names[module], target)

    with evaluated(original), hooked(list(names), record):
        forward(original)
    layers = {converted.get_submodule(name): name for name in targets}
    fitted: set[nn.Module] = set()

    def fit(layer: nn.Module, _: object, output: Tensor) -> Tensor:
        assert isinstance(layer, StandardizedLayer)
        if layer in fitted:
            return output
        fitted.add(layer)
        return _fit(layer, output, wanted[layers[layer]])

    with evaluated(converted), hooked(list(layers), fit):
        forward(converted)


def _fit(layer: StandardizedLayer, output: Tensor, target: Tensor) -> Tensor:
    """`target` has the channels last."""
    assert layer.bias is not None
    channel = 1 - layer.weight.dim()
    found = output.movedim(channel, -1) - layer.bias
    z, y = (t.double().reshape(-1, t.shape[-1]) for t in (found, target))
    z_mean, y_mean = z.mean(0), y.mean(0)
    variance = (z - z_mean).square().mean(0)
    slope = ((z - z_mean) * (y - y_mean)).mean(0) / variance
    slope = torch.where(variance > 0, slope, torch.ones_like(slope))
    shift = y_mean - slope * z_mean
    layer.alpha.mul_(slope)
    layer.bias.copy_(shift)
    return (found * slope.to(found.dtype) + shift.to(found.dtype)).movedim(-1, channel)


def affine_of(norm: nn.Module) -> Affine | None:
    """Scale and shift a channel of a norm in eval mode; None if it has no running statistics."""
    mean, variance = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
        return None
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    scale = (variance + getattr(norm, "eps", 1e-5)).rsqrt()
    scale = scale * weight.detach() if isinstance(weight, Tensor) else scale
    shift = -mean * scale
    return scale, shift + bias.detach() if isinstance(bias, Tensor) else shift


def affine_layer(norm: nn.Module, dims: int) -> nn.Module | None:
    """A norm's scale and shift as a plain layer, a depthwise 1x1 convolution over `dims` dimensions; None if it has none."""
    kinds: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    affine = affine_of(norm)
    if affine is None or dims not in kinds:
        return None
    scale, shift = affine
    layer = kinds[dims](len(scale), len(scale), 1, groups=len(scale)).to(scale)
    layer.weight.data.copy_(scale.view_as(layer.weight))
    assert layer.bias is not None
    layer.bias.data.copy_(shift)
    return layer


@torch.no_grad()
def scale_alpha(layer: StandardizedLayer, scale: Tensor) -> None:
    """Alpha at which the kernel is `scale_o (w_o - m_o)`."""
    raw = layer.filters().flatten(1)
    c = layer.gain * raw.shape[1] ** -0.5
    gamma = layer.gamma * 2 / raw.shape[1] if layer.relative_gamma else layer.gamma
    layer.alpha.copy_(scale * (raw.var(1, unbiased=False) + gamma).sqrt() / c)


@torch.no_grad()
def output_error(original: nn.Module, converted: nn.Module, forward: Forward) -> float:
    """Root mean square of the outputs' difference in eval mode, in units of the original outputs' deviation."""
    with evaluated(original):
        wanted = _flat(forward(original))
    with evaluated(converted):
        found = _flat(forward(converted))
    return float((found - wanted).square().mean().sqrt() / wanted.std())


def _flat(outputs: Any) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors_in(outputs) if tensor.is_floating_point()])
