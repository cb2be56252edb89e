"""A bound on the length of each layer's step, for any optimizer whose step is its learning rate times a gradient."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pws.errors import PwsError

STEP_BOUND: Final = 0.03
"""The longest step of a layer of PWS: about the largest that training held at every batch size (docs/methods.md)."""


def clip_grad(model: nn.Module, optimizer: Optimizer, bound: float = STEP_BOUND) -> Tensor:
    """Shorten gradients in place so that no layer's step is longer than `bound`; call it before `optimizer.step()`.

        length = sqrt(sum_p (lr_p ||g_p||)^2),        g_p <- g_p min(1, bound / length)

    over the parameters p of a layer (a module's own): how far a step moves the layer, before momentum and weight decay. `lr_p`
    is the largest rate of the parameter's group, which a scheduler notes there ("initial_lr", or OneCycleLR's "max_lr");
    where there is none, its present one. So small learning rates and large batches, with their small gradients, are hardly
    ever clipped, and large rates as much as they need: one bound for all of them. A bound a layer, and not one for all
    together, lets deep networks train, whose gradients differ in size from layer to layer.

    Under `torch.amp.GradScaler` call `scaler.unscale_(optimizer)` first, as for torch's `clip_grad_norm_`.

    Args:
        model: the network; parameters of it that the optimizer does not hold, or that have no gradient, are passed over.
        optimizer: SGD, with or without momentum; on optimizers that divide by the gradient's size, such as Adam, it has
            hardly any effect.
        bound: the longest step, in the unit of the weights.

    Returns:
        The largest length before clipping, a scalar tensor; where a gradient is not finite, neither is it.

    Raises:
        PwsError: the bound is not positive, the optimizer holds no parameter of the model, or it steps in the backward pass.
    """
    if not 0 < bound < float("inf"):
        raise PwsError(f"the bound on a step's length must be positive and finite; got {bound!r}. Usual: {STEP_BOUND}.")
    if getattr(optimizer, "step_in_backward", False):
        raise PwsError(
            "step_in_backward=True has moved the layers in the backward pass, and no gradient is left to clip. The optimizer's "
            "own step_bound holds there; make it without step_in_backward to clip otherwise."
        )
    rates = {parameter: peak_lr(group) for group in optimizer.param_groups for parameter in group["params"]}
    layers = _layers(model, rates)
    gradients = [parameter.grad for layer in layers for parameter in layer if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    lrs = [rates[parameter] for layer in layers for parameter in layer if parameter.grad is not None]
    numbers = [i for i, layer in enumerate(layers) for parameter in layer if parameter.grad is not None]
    device = gradients[0].device
    norms = torch.stack([norm.to(device, torch.float32) for norm in torch._foreach_norm(gradients)])
    squares = (norms * torch.tensor(lrs, device=device)).square()
    layer_of = torch.tensor(numbers, device=device)
    lengths = torch.zeros(len(layers), device=device).index_add_(0, layer_of, squares).sqrt()
    factors = (bound / lengths).clamp(max=1.0)[layer_of]  # a length of 0 gives infinity, and then 1
    for gradient, factor in zip(gradients, factors.unbind(), strict=True):
        gradient.mul_(factor.to(gradient.device))
    return lengths.max()


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


def peak_lr(group: dict[str, Any]) -> float:
    """The largest rate of a group over its schedule, as far as the group tells."""
    return max(float(group[key]) for key in ("lr", "initial_lr", "max_lr") if key in group)
