"""The bound on a step's length, against the definition: how far SGD moves the weights."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from tolerances import assert_close
from torch import Tensor, nn
from torch.utils.data import DataLoader

import pws
from pws.training import ClipGrad


class Layers(nn.Module):
    """A module a list of gradients; a parameter a gradient."""

    def __init__(self, *layers: list[list[float]]) -> None:
        super().__init__()
        for i, gradients in enumerate(layers):
            layer = nn.Module()
            for j, gradient in enumerate(gradients):
                parameter = nn.Parameter(torch.zeros(len(gradient)))
                parameter.grad = torch.tensor(gradient)
                layer.register_parameter(f"p{j}", parameter)
            self.add_module(f"layer{i}", layer)


def sgd(model: nn.Module, lr: float = 1.0) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr)


@pytest.mark.parametrize("lr", [0.01, 0.1, 2.0])
def test_a_layers_step_is_at_most_the_bound_long(lr: float) -> None:
    model = Layers([[3.0, 4.0], [12.0]], [[0.1]])
    optimizer = sgd(model, lr)
    assert_close(pws.clip_grad(model, optimizer, 0.5), lr * 13, "float32")
    optimizer.step()
    moved = torch.cat([p.detach() for p in model.layer0.parameters()])
    assert_close(moved.norm(), min(0.5, lr * 13), "float32")
    assert_close(moved / moved.norm(), -torch.tensor([3.0, 4.0, 12.0]) / 13, "float32")
    assert_close(model.layer1.p0.item(), -lr * 0.1, "float32")


def test_a_short_step_is_left_alone_to_the_bit() -> None:
    model = Layers([[0.03, 0.04]])
    pws.clip_grad(model, sgd(model, 0.1))
    assert torch.equal(model.layer0.p0.grad, torch.tensor([0.03, 0.04]))


def test_the_usual_bound() -> None:
    model = Layers([[5.0]])
    optimizer = sgd(model)
    pws.clip_grad(model, optimizer)
    optimizer.step()
    assert_close(model.layer0.p0.item(), -0.3, "float32")


def test_parameters_count_with_their_own_rates() -> None:
    model = Layers([[3.0], [4.0]])
    a, b = model.parameters()
    optimizer = torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.1}])
    assert_close(pws.clip_grad(model, optimizer, 1.0), math.hypot(3, 0.4), "float32")
    optimizer.step()
    assert_close(math.hypot(a.item(), b.item()), 1.0, "float32")


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda sgd: torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 1 / (step + 1)),
        lambda sgd: torch.optim.lr_scheduler.OneCycleLR(sgd, max_lr=0.5, total_steps=9),
    ],
)
def test_the_rate_is_the_schedules_largest(scheduler: Any) -> None:
    model = Layers([[2.0]])
    optimizer = sgd(model, 0.5)
    schedule = scheduler(optimizer)
    for _ in range(3):
        optimizer.step()
        schedule.step()
        assert_close(pws.clip_grad(model, optimizer, 10.0), 1.0, "float32")


def test_what_the_optimizer_does_not_hold_or_has_no_gradient_is_passed_over() -> None:
    model = Layers([[5.0], [7.0]], [[1.0]])
    model.layer1.p0.grad = None
    assert_close(pws.clip_grad(model, torch.optim.SGD([model.layer0.p0, model.layer1.p0], lr=1.0)), 5.0, "float32")
    assert model.layer0.p1.grad.item() == 7.0
    assert model.layer1.p0.grad is None
    model.layer0.p0.grad = None
    assert float(pws.clip_grad(model, torch.optim.SGD([model.layer0.p0], lr=1.0))) == 0


def test_a_shared_parameter_is_shortened_once() -> None:
    model = Layers([[3.0]], [[4.0]])
    model.layer1.register_parameter("shared", model.layer0.p0)
    pws.clip_grad(model, sgd(model), 1.0)
    assert [model.layer0.p0.grad.item(), model.layer1.p0.grad.item()] == pytest.approx([1.0, 1.0])


def test_zero_gradients_stay_zero() -> None:
    model = Layers([[0.0, 0.0]])
    pws.clip_grad(model, sgd(model))
    assert torch.equal(model.layer0.p0.grad, torch.zeros(2))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows(bad: float) -> None:
    model = Layers([[bad, 1.0]], [[1.0]])
    assert not pws.clip_grad(model, sgd(model)).isfinite()
    assert model.layer0.p0.grad.isnan().any()


@pytest.mark.parametrize("bound", [0, -1.0, math.nan, math.inf, "none"])
def test_a_bound_that_is_not_positive_is_refused(bound: Any) -> None:
    model = Layers([[1.0]])
    with pytest.raises(pws.PwsError, match="must be positive and finite; got"):
        pws.clip_grad(model, sgd(model), bound)


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(pws.PwsError, match="holds no parameter of the model"):
        pws.clip_grad(Layers([[1.0]]), sgd(Layers([[1.0]])))


@pytest.mark.parametrize(
    ("dtype", "entry"),
    [
        (torch.float16, 6e4),
        (torch.bfloat16, 1e30),
        (torch.float32, 2e18),
        (torch.float32, 1e25),
        (torch.float32, 3e38),
        (torch.float64, 1e200),
    ],
)
@pytest.mark.parametrize("lr", [0.1, 1e3])
def test_a_large_finite_gradient_gives_a_step_of_the_bound(dtype: torch.dtype, entry: float, lr: float) -> None:
    model = Layers([[0.0] * 1000, [0.0] * 24], [[3.0, 4.0]])
    for i, p in enumerate(model.layer0.parameters()):
        p.data = p.data.to(dtype)
        p.grad = torch.full((len(p),), entry * (-1) ** i, dtype=dtype)
    length = pws.clip_grad(model, sgd(model, lr), 0.03)
    kept = float(model.layer0.p0.grad.double()[0] / entry), float(model.layer0.p1.grad.double()[0] / -entry)
    expected = 0.03 / (lr * math.sqrt(1024)) / entry  # by which each entry has shrunk
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    assert kept == pytest.approx((expected, expected), rel=tolerance)
    assert float(length) == pytest.approx(lr * math.sqrt(1024) * float(torch.tensor(entry, dtype=dtype)), rel=1e-5)
    assert_close(model.layer1.p0.grad.norm() * lr, 0.03 if lr * 5 > 0.03 else lr * 5, "float32")


class Scaled:
    """A model trained with a GradScaler, by the right steps or without `unscale_`."""

    def __init__(self, **settings: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        self.scaler = torch.amp.GradScaler("cpu", **settings)

    def backward(self) -> None:
        self.scaler.scale(self.model(torch.ones(4, 4)).square().mean()).backward()


@pytest.mark.parametrize("unscaled", [True, False])
@pytest.mark.parametrize("enabled", [True, False])
def test_gradients_that_are_scaled_are_noticed(unscaled: bool, enabled: bool) -> None:
    run = Scaled(enabled=enabled)
    optimizer = sgd(run.model, 5.0)
    for step in range(2):
        run.backward()
        if unscaled:
            run.scaler.unscale_(optimizer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert float(pws.clip_grad(run.model, optimizer, 1e-3)) > 1e-3
        assert any("scaler.unscale_" in str(w.message) for w in caught) == (enabled and not unscaled and step == 0)
        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad()
    run.scaler = None  # a scaler that is in use belongs to this test alone


@pytest.mark.parametrize("made", [pws.optim.SGD, pws.optim.AdamW])
@pytest.mark.parametrize("right", [True, False])
def test_an_optimizer_that_is_stepped_past_its_scaler_notices(made: Any, right: bool) -> None:
    run = Scaled()
    pws.mark(run.model[0])
    optimizer = made(run.model, lr=0.1)
    run.backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if right:
            run.scaler.step(optimizer)
        else:
            optimizer.step()
    assert any("scaler.step" in str(w.message) for w in caught) != right
    run.scaler = None


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
