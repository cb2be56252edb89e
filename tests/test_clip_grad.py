"""The bound on a step's length, against the definition: how far SGD moves the weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from tolerances import assert_close
from torch import Tensor, nn
from torch.utils.data import DataLoader

import pws
from pws.training import ClipGrad


def parameters_with(*gradients: list[float]) -> list[nn.Parameter]:
    parameters = []
    for gradient in gradients:
        parameters.append(nn.Parameter(torch.zeros(len(gradient))))
        parameters[-1].grad = torch.tensor(gradient)
    return parameters


@pytest.mark.parametrize("lr", [0.01, 0.1, 2.0])
def test_a_step_is_at_most_the_bound_long(lr: float) -> None:
    parameters = parameters_with([3.0, 4.0], [12.0])
    sgd = torch.optim.SGD(parameters, lr=lr)
    length = pws.clip_grad(sgd, 0.5)
    assert_close(length, lr * 13, "float32")
    sgd.step()
    moved = torch.cat([p.detach() for p in parameters])
    assert_close(moved.norm(), min(0.5, lr * 13), "float32")
    assert_close(moved / moved.norm(), -torch.tensor([3.0, 4.0, 12.0]) / 13, "float32")


def test_a_short_step_is_left_alone_to_the_bit() -> None:
    parameters = parameters_with([0.3, 0.4])
    pws.clip_grad(torch.optim.SGD(parameters, lr=0.1))
    assert torch.equal(parameters[0].grad, torch.tensor([0.3, 0.4]))


def test_groups_count_with_their_own_rates() -> None:
    a, b = parameters_with([3.0], [4.0])
    sgd = torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.1}])
    assert_close(pws.clip_grad(sgd, 1.0), math.hypot(3, 0.4), "float32")
    sgd.step()
    assert_close(math.hypot(a.item(), b.item()), 1.0, "float32")


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda sgd: torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 1 / (step + 1)),
        lambda sgd: torch.optim.lr_scheduler.OneCycleLR(sgd, max_lr=0.5, total_steps=9),
    ],
)
def test_the_rate_is_the_schedules_largest(scheduler: Any) -> None:
    parameters = parameters_with([2.0])
    sgd = torch.optim.SGD(parameters, lr=0.5)
    schedule = scheduler(sgd)
    for _ in range(3):
        sgd.step()
        schedule.step()
        assert_close(pws.clip_grad(sgd, 10.0), 1.0, "float32")


def test_parameters_without_gradient_are_passed_over() -> None:
    frozen, used = nn.Parameter(torch.ones(2)), parameters_with([5.0])[0]
    assert_close(pws.clip_grad(torch.optim.SGD([frozen, used], lr=1.0)), 5.0, "float32")
    assert frozen.grad is None
    assert float(pws.clip_grad(torch.optim.SGD([frozen], lr=1.0))) == 0


def test_zero_gradients_stay_zero() -> None:
    parameters = parameters_with([0.0, 0.0])
    pws.clip_grad(torch.optim.SGD(parameters, lr=1.0))
    assert torch.equal(parameters[0].grad, torch.zeros(2))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows(bad: float) -> None:
    parameters = parameters_with([bad, 1.0])
    assert not pws.clip_grad(torch.optim.SGD(parameters, lr=1.0)).isfinite()
    assert parameters[0].grad.isnan().any()


@pytest.mark.parametrize("bound", [0, -1.0, math.nan, math.inf])
def test_a_bound_that_is_not_positive_is_refused(bound: float) -> None:
    with pytest.raises(pws.PwsError, match="must be positive and finite; got"):
        pws.clip_grad(torch.optim.SGD(parameters_with([1.0]), lr=1.0), bound)


class Slope(LightningModule):
    """A loss whose gradient is 3."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return 3 * self.weight * batch.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_callback_bounds_every_step_of_any_lightning_module(accumulate: int) -> None:
    module = Slope()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        accumulate_grad_batches=accumulate,
        callbacks=[ClipGrad(0.25)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(torch.ones(4)))
    assert_close(module.weight, -0.5, "float32")
