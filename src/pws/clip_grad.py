"""A bound on the length of a step, for any optimizer whose step is its learning rate times a gradient."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer

from pws.errors import PwsError

STEP_BOUND: Final = 0.1
"""The longest step of PWS: the largest bound that training held at every batch size (docs/methods.md)."""


def clip_grad(optimizer: Optimizer, bound: float = STEP_BOUND) -> Tensor:
    """Shorten all gradients, in place and by one factor, so that no step is longer than `bound`; call it before `step()`.

        length = sqrt(sum_k (lr_k ||g_k||)^2),        g <- g min(1, bound / length)

    over the parameter groups k: how far a step moves the weights, before momentum and weight decay. `lr_k` is the group's
    largest rate, which a scheduler notes in it ("initial_lr", or OneCycleLR's "max_lr"); where there is none, its present one.
    So small learning rates and large batches, with their small gradients, are hardly ever clipped, and large rates are
    clipped as much as they need: one bound for all of them. PWS needs it because nothing else holds its filters: see
    docs/methods.md for what it brings.

    Under `torch.amp.GradScaler` call `scaler.unscale_(optimizer)` first, as for torch's `clip_grad_norm_`.

    Args:
        optimizer: SGD, with or without momentum; on optimizers that divide by the gradient's size, such as Adam, it has
            hardly any effect.
        bound: the longest step, in the unit of the weights.

    Returns:
        The length before clipping, a scalar tensor. Not finite if a gradient is not: then the gradients become NaN.

    Raises:
        PwsError: the bound is not positive.
    """
    if not 0 < bound < float("inf"):
        raise PwsError(
            f"the bound on a step's length must be positive and finite; got {bound!r}. The default is {STEP_BOUND}."
        )
    gradients = [(_peak_lr(group), _gradients(group)) for group in optimizer.param_groups]
    lengths = [lr * torch.nn.utils.get_total_norm(tensors) for lr, tensors in gradients if tensors]
    if not lengths:
        return torch.zeros(())
    length: Tensor = torch.stack([part.to(lengths[0].device) for part in lengths]).norm()
    factor = (bound / length).clamp(max=1.0)  # a length of 0 gives infinity, and then 1
    for _, tensors in gradients:
        for tensor in tensors:
            tensor.mul_(factor.to(tensor.device))
    return length


def _peak_lr(group: dict[str, Any]) -> float:
    return max(float(group[key]) for key in ("lr", "initial_lr", "max_lr") if key in group)


def _gradients(group: dict[str, Any]) -> list[Tensor]:
    return [parameter.grad for parameter in group["params"] if parameter.grad is not None]
