"""The average gradient of each method's network in its first step."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pws.demo.cells import METHOD_ORDER, Cell, prepare, recipe_of
from pws.diagnosis import average_gradient_ratio


def average_gradients() -> dict[str, dict[str, float]]:
    """Method to layer to `n` times the average-gradient ratio, mean over filters, on the first batch before any step:
    how many times the square of the average gradient is what independent gradients would make it.

    1 is what independent gradients would give. The gradient is that by the trainable weight: WN's direction, PWS's raw
    weight.
    """
    return {method: _of(method) for method in METHOD_ORDER}


def _of(method: str) -> dict[str, float]:
    data, module = prepare(recipe_of(Cell(method, method, lr=0.0, bounded=False)))
    images, labels = next(iter(data.train_dataloader()))
    torch.autograd.backward(F.cross_entropy(module(images), labels))
    grads = {name: _weight_grad(layer) for name, layer in module.model.named_modules()}
    return {
        name: float(average_gradient_ratio(grad).mean()) * grad[0].numel()
        for name, grad in grads.items()
        if grad is not None
    }


def _weight_grad(layer: nn.Module) -> Tensor | None:
    """The gradient of a convolution's trainable weight, None for other modules."""
    if not isinstance(layer, nn.Conv2d):
        return None
    parametrizations = getattr(layer, "parametrizations", None)
    weight = layer.weight if parametrizations is None else parametrizations.weight.original1
    assert isinstance(weight, torch.Tensor)
    return weight.grad
