"""A converted model that computes nearly what the trained one did.

In eval mode a BatchNorm is a scale and a shift a channel. Right behind a layer they go into its weight and bias;
elsewhere they stay, as a depthwise 1x1 convolution. Centring a filter `w` loses `m sum(x)`, the patch's sum times the filter's
mean `m`. So each layer gets the zero-mean filters that come nearest to what the trained layer gave on the example
(`pws.surgery.nearest`), in the order of execution: each makes up for what those before it changed in its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pws.autocast import fresh_casts
from pws.diagnosis.batch import tensors_in
from pws.errors import PwsError
from pws.surgery.calibrate import evaluated, hooked
from pws.surgery.nearest import nearest_filters
from pws.surgery.standardized import own_filters, set_filters
from pws.surgery.trace import input_of

Forward = Callable[[nn.Module], Any]
Affine = tuple[Tensor, Tensor]
"""Scale and shift a channel."""
Progress = Callable[[int, int], None]


@fresh_casts()
@torch.no_grad()
def match(
    original: nn.Module,
    converted: nn.Module,
    targets: Mapping[str, Affine | None],
    forward: Forward,
    progress: Progress | None,
) -> None:
    """Fit weight and bias of the marked layers of `converted`.

    Args:
        original: the trained model.
        converted: its copy, with marked layers.
        targets: name of each layer to fit, to the scale and shift that its output in `original` went through.
        forward: runs a model on the example.
        progress: called with the number of layers fitted and of all.
    """
    wanted: dict[str, Tensor] = {}
    names = {original.get_submodule(name): name for name in targets}

    def record(module: nn.Module, _: object, __: object, output: Tensor) -> None:
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

    def fit(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if layer in fitted:
            return output
        fitted.add(layer)
        name = layers[layer]
        affine, trained_OK = targets[name], own_filters(original.get_submodule(name)).flatten(1)
        trained_OK = trained_OK if affine is None else trained_OK * affine[0][:, None]
        inputs = input_of(args, kwargs)
        _check_finite(name, inputs, wanted[name])

        def call(module: nn.Module, some: Tensor) -> Tensor:
            # Transposed convolutions are given an output_size too.
            named = {key: some if value is inputs else value for key, value in kwargs.items()}
            result: Tensor = module.forward(*(some if value is inputs else value for value in args), **named)
            return result

        result = nearest_filters(layer, inputs, wanted.pop(name), trained_OK, call)
        if progress is not None:
            progress(len(fitted), len(targets))
        return result

    with evaluated(converted), hooked(list(layers), fit):
        forward(converted)


def _check_finite(name: str, *tensors: Tensor) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise PwsError(
            f"a warm start keeps what a trained model computes, which must be finite; at layer {name!r} it is not, on the "
            "example. The checkpoint's weights or a norm's running statistics hold NaN or infinity: look for them there."
        )


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


@torch.no_grad()
def absorb(layer: nn.Module, norm: nn.Module) -> None:
    """Scale and shift of a norm, into weight and bias of the plain layer before it."""
    affine = affine_of(norm)
    assert affine is not None
    filters, bias = own_filters(layer), layer._parameters["bias"]
    assert bias is not None
    set_filters(layer, filters * affine[0].view(-1, *[1] * (filters.dim() - 1)))
    bias.copy_(bias * affine[0] + affine[1])


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


@fresh_casts()
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
