"""The bound on a step for any momentum, against what the optimizer does with it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pws.optim import SGD
from pws.optim.bound import bound_with


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("steps", [1, 5, 50])
def test_a_client_goes_as_far_as_central_training(momentum: float, steps: int) -> None:
    layer = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    start = layer.weight.detach().clone()
    optimizer = SGD(layer, lr=0.5, momentum=momentum, step_bound=bound_with(momentum, steps))
    for _ in range(steps):
        layer.weight.grad = torch.full_like(layer.weight, 100.0)
        optimizer.step()
    assert float((layer.weight - start).norm()) == pytest.approx(0.3 * steps, rel=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
def test_a_step_goes_as_far_in_the_long_run(momentum: float) -> None:
    layer = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    optimizer = SGD(layer, lr=0.5, momentum=momentum, step_bound=bound_with(momentum))
    for _ in range(3000):
        before = layer.weight.detach().clone()
        layer.weight.grad = torch.full_like(layer.weight, 100.0)
        optimizer.step()
    assert float((layer.weight - before).norm()) == pytest.approx(0.3, rel=1e-9)
