"""The bound on a client's steps, against what the optimizer does with it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pws._errors import PwsError
from pws.federated.step_bound import client_bound
from pws.optim import SGD


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("steps", [1, 5, 50])
def test_a_client_goes_as_far_as_central_training(momentum: float, steps: int) -> None:
    layer = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    start = layer.weight.detach().clone()
    optimizer = SGD(layer, lr=0.5, momentum=momentum, step_bound=client_bound(momentum, steps))
    for _ in range(steps):
        layer.weight.grad = torch.full_like(layer.weight, 100.0)
        optimizer.step()
    assert float((layer.weight - start).norm()) == pytest.approx(0.3 * steps, rel=1e-9)


@pytest.mark.parametrize(("momentum", "steps"), [(-0.1, 5), (1.0, 5), (0.9, 0), (float("nan"), 5)])
def test_what_can_not_be(momentum: float, steps: int) -> None:
    with pytest.raises(PwsError, match=f"got momentum {momentum!r} and {steps} steps"):
        client_bound(momentum, steps)
