"""The bound on a step for any momentum, against what the optimizer does with it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import pws
from pws.optim import SGD
from pws.optim.bound import bound_with


def pws_sgd(layer: nn.Module, momentum: float) -> torch.optim.Optimizer:
    return SGD(layer, lr=0.5, momentum=momentum)


def torch_sgd(layer: nn.Module, momentum: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(layer.parameters(), lr=0.5, momentum=momentum)


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


@pytest.mark.parametrize("make", [pws_sgd, torch_sgd])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
def test_a_step_goes_as_far_in_the_long_run(momentum: float, make: Callable[..., torch.optim.Optimizer]) -> None:
    layer = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    optimizer = make(layer, momentum)
    for _ in range(3000):
        before = layer.weight.detach().clone()
        layer.weight.grad = torch.full_like(layer.weight, 100.0)
        if isinstance(optimizer, torch.optim.SGD):
            pws.clip_grad(layer, optimizer)
        optimizer.step()
    assert float((layer.weight - before).norm()) == pytest.approx(0.3, rel=1e-9)


def test_an_optimizer_without_momentum_has_the_usual_bound() -> None:
    layer = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.Rprop(layer.parameters(), lr=0.5)
    layer.weight.grad = torch.ones(1, 1)
    pws.clip_grad(layer, optimizer)
    assert layer.weight.grad.item() == pytest.approx(0.03 / 0.5)


def test_a_momentum_of_1_has_no_usual_bound() -> None:
    with pytest.raises(pws.PwsError, match="a momentum of at least 0 and below 1; got 1"):
        SGD(nn.Linear(1, 1), lr=0.5, momentum=1.0)
    assert SGD(nn.Linear(1, 1), lr=0.5, momentum=1.0, step_bound=0.1).step_bound == 0.1
