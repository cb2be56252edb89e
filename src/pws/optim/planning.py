"""Which parameters one step moves, and how: a plan, made once for the parameters that have gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from torch import Tensor

from pws.kernels import chosen, steps_of
from pws.optim.base import StandardizingOptimizer
from pws.optim.moving import Groups, Moving, whole_gradient
from pws.optim.sharding import local

MOST_PLANS: Final = 4
"""Plans kept per parameter: which parameters have gradients may change from step to step."""


def moving(
    optimizer: StandardizingOptimizer, moments: tuple[str, ...], parameters: Iterable[Tensor] | None
) -> Moving | None:
    """What has a gradient, all or of `parameters`; None if nothing has."""
    groups = optimizer.with_gradients(parameters)
    if not groups:
        return None
    key = (moments, *map(id, groups))
    now = optimizer.plans.get(key)
    if now is None or not _is_current(now, optimizer, groups):
        if len(optimizer.plans) > MOST_PLANS * len(optimizer.members):
            optimizer.plans.clear()
        now = optimizer.plans[key] = _plan(optimizer, moments, groups)
    now.groups = groups
    for weight, bias, layer in zip(now.weights, now.biases, now.layers, strict=True):
        layer.rates, layer.peaks = optimizer.rates(weight, groups[weight], None if bias is None else groups[bias])
        layer.grad = optimizer.gradient(weight, layer)
        layer.bias_grad = (
            None if bias is None else local(whole_gradient(bias)).to(bias.dtype).resolve_neg().contiguous()
        )
    return now


def _plan(optimizer: StandardizingOptimizer, moments: tuple[str, ...], groups: Groups) -> Moving:
    weights = [weight for weight in groups if optimizer.members[weight].mark is not None]
    biases = [optimizer.bias_of(weight, groups) for weight in weights]
    layers = [optimizer.layer(weight, bias, moments) for weight, bias in zip(weights, biases, strict=True)]
    taken = {*weights, *(bias for bias in biases if bias is not None)}
    plain = [parameter for parameter in groups if parameter not in taken]
    numbers = [id(optimizer.layers[parameter]) for parameter in plain]
    return Moving(weights, biases, layers, steps_of(layers), plain, numbers, chosen(), groups)


def _is_current(now: Moving, optimizer: StandardizingOptimizer, groups: Groups) -> bool:
    """Whether nobody else has written to the kernels or moved them, and their gradients are as they were."""
    return now.implementation == chosen() and all(
        optimizer.is_ours(weight)
        and bias is optimizer.bias_of(weight, groups)
        and layer.grad_dtype == whole_gradient(weight).dtype
        and (layer.is_copy or layer.kernel.data_ptr() == local(weight).data_ptr())
        and (bias is None or layer.bias is None or layer.bias.data_ptr() == local(bias).data_ptr())
        for weight, bias, layer in zip(now.weights, now.biases, now.layers, strict=True)
    )
