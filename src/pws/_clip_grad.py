"""A bound on the length of each layer's step, for any optimizer whose step is its learning rate times a gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pws._errors import PwsError
from pws.optim.bound import Bound, bound_for, by_layer, is_bound, peak_lr
from pws.optim.moving import norms_of
from pws.optim.scaler import notice_scaled_gradients
from pws.optim.sharding import complete_gradient, is_sharded, local, sum_over_shards


def clip_grad(model: nn.Module, optimizer: Optimizer, bound: Bound = "auto") -> Tensor:
    """Shorten gradients in place so that no layer's step is longer than `bound`; call it before `optimizer.step()`.

        length = sqrt(sum_p (lr_p ||g_p||)^2),        g_p <- g_p min(1, bound / length)

    over the parameters p of a layer (a module's own). The length is how far a step moves the layer, before momentum and weight
    decay. `lr_p` is the largest rate of the parameter's group, which a scheduler notes there ("initial_lr", or OneCycleLR's
    "max_lr"). Without a scheduler it is the present rate.

    So small learning rates and large batches, with their small gradients, are hardly ever clipped. Large rates are clipped as
    much as they need: one bound serves all of them. One bound per layer, rather than one for the whole network, lets deep
    networks train, whose gradients differ in size from layer to layer.

    Under `torch.amp.GradScaler` call `scaler.unscale_(optimizer)` first, as for torch's `clip_grad_norm_`. A warning tells if
    it is missing. With Opacus `pws.private.bound_steps(model, optimizer)` calls it inside the step.
    Sharded parameters (`fully_shard`) are clipped by the length of the whole layer's step; every process calls it.

    Args:
        model: the network; parameters of it that the optimizer does not hold, or that have no gradient, are passed over.
        optimizer: SGD, with or without momentum; on optimizers that divide by the gradient's size, such as Adam, it has
            hardly any effect.
        bound: the longest step, in the unit of the weights. "auto" is `0.3 (1 - momentum)`, with the optimizer's momentum (0.9
            where it has none), which moves a layer at the bound equally far with every momentum.

    Returns:
        The largest length before clipping, a scalar tensor; where a gradient is not finite, neither is it.

    Raises:
        PwsError: the bound is not positive, the optimizer holds no parameter of the model, or it steps in the backward pass.
            Or the gradients are per sample, and Opacus' optimizer has yet to make those that count.
    """
    bound = bound_for(optimizer) if bound == "auto" else bound
    if not is_bound(bound):
        raise PwsError(
            f"the bound on a step's length must be positive and finite; got {bound!r}. Leave it out for the usual one."
        )
    if getattr(optimizer, "step_in_backward", False):
        raise PwsError(
            "step_in_backward=True has moved the layers in the backward pass, and no gradient is left to clip. The optimizer's "
            "own step_bound holds there; make it without step_in_backward to clip otherwise."
        )
    rates = {parameter: peak_lr(group) for group in optimizer.param_groups for parameter in group["params"]}
    layers = [[p for p in layer if p.grad is not None] for layer in _layers(model, rates)]
    parameters = [parameter for layer in layers for parameter in layer]
    if not parameters:
        return torch.zeros(())
    for parameter in parameters:
        _check_sampled(parameter)
        complete_gradient(parameter)
    gradients = [local(_grad(parameter)) for parameter in parameters]
    numbers = [i for i, layer in enumerate(layers) for _ in layer]
    lengths = _lengths(parameters, gradients, [rates[parameter] for parameter in parameters], numbers)
    longest = lengths.max()
    if float(longest) > bound:
        notice_scaled_gradients(optimizer)
    factors = (bound / lengths).clamp(max=1.0)  # a length of 0 gives infinity, and then 1
    # A factor for gradients near the end of float32 lies below its start: then in two steps.
    times = 1 if float(longest) < 1e30 else 2
    for gradient, factor in zip(gradients, (factors ** (1 / times)).unbind(), strict=True):
        for _ in range(times):
            gradient.mul_(factor.to(gradient.device))
    return longest


def _lengths(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], lrs: Sequence[float], layers: Sequence[int]
) -> Tensor:
    """How far a step moves each parameter's layer, over all processes."""
    if any(map(is_sharded, parameters)):
        # float64 has room for all squares of float32, whatever the other processes hold.
        norms = norms_of(gradients, torch.float64)
        squares = sum_over_shards((norms * norms.new_tensor(lrs)).square(), parameters)
        return by_layer(squares, layers).sqrt()
    norms = norms_of(gradients)
    lengths = by_layer((norms * norms.new_tensor(lrs)).square(), layers).sqrt()
    return lengths if torch.isfinite(lengths).all() else _careful_lengths(gradients, lrs, layers).to(lengths.device)


def _careful_lengths(gradients: Sequence[Tensor], lrs: Sequence[float], layers: Sequence[int]) -> Tensor:
    """The same where squares overflow: each gradient in units of its largest entry."""
    steps: dict[int, list[float]] = {layer: [] for layer in layers}
    for gradient, lr, layer in zip(gradients, lrs, layers, strict=True):
        largest = gradient.abs().max().to(torch.promote_types(gradient.dtype, torch.float32))
        unit = gradient.to(largest.dtype) / largest if 0 < float(largest) < math.inf else gradient
        steps[layer].append(lr * float(largest) * float(torch.linalg.vector_norm(unit)))
    return torch.tensor([math.hypot(*steps[layer]) for layer in layers], dtype=torch.float64, device="cpu")


def _check_sampled(parameter: Any) -> None:
    """Raise `PwsError` for a gradient that Opacus' optimizer makes anew in its step, from gradients per sample."""
    per_sample = getattr(parameter, "grad_sample", None)
    newest = per_sample[-1] if isinstance(per_sample, list) and per_sample else per_sample
    if isinstance(newest, Tensor) and not hasattr(newest, "_processed"):
        raise PwsError(
            "Opacus makes the gradients inside its optimizer's step, from gradients per sample: what is clipped before is "
            "lost. Call pws.private.bound_steps(model, optimizer) once, which clips there; or train with pws.optim, whose "
            "bound holds."
        )


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _layers(model: nn.Module, rates: dict[Tensor, float]) -> list[list[nn.Parameter]]:
    """The optimizer's parameters of each module; a shared one belongs to the first module that has it."""
    seen: set[nn.Parameter] = set()
    layers: list[list[nn.Parameter]] = []
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p in rates and p not in seen]
        seen.update(own)
        if own:
            layers.append(own)
    if not layers:
        raise PwsError(
            "the optimizer holds no parameter of the model. Was the model copied or converted after it was made?"
        )
    return layers
