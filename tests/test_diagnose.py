"""`pws.diagnose` leaves a model and everything around it as they were."""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pytest
import torch
from diagnose_helpers import (
    cross_entropy,
    images,
    small_net,
    state,
)
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import pws
from pws._errors import PwsError
from pws.diagnosis import diagnose


class Noisy(nn.Module):
    """Uses every generator, counts in a buffer that it replaces, and fails on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()
        self.fail: BaseException | None = None
        self.register_buffer("count", torch.zeros(3))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + random.random() + float(np.random.rand())
        y: Tensor = self.net(x + 0.01 * torch.randn_like(x))
        if self.fail is not None:
            raise self.fail
        return y


def prepared(gradients: bool) -> Noisy:
    """In mixed modes, with gradients or only some of them, and hooks of the user's."""
    model = Noisy()
    model.net[3].eval()
    if gradients:
        model(images()[0]).square().mean().backward()
        model.net[4].weight.grad = None
    model.net[0].register_forward_hook(lambda *_: None)
    model.net[0].weight.register_hook(lambda _: None)
    return model


@pytest.mark.parametrize("gradients", [False, True], ids=["no gradients", "gradients"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_model_is_left_as_it_was(gradients: bool, training: bool) -> None:
    model = prepared(gradients)
    if not training:
        model.eval()
        model.net[1].train()
    batch, before = images(), state(model)
    inputs = batch[0].clone()
    diagnosis = diagnose(model, batch, cross_entropy)
    assert len(diagnosis.layers) == 3
    assert state(model) == before
    assert diagnosis.settings.training is training
    assert torch.equal(batch[0], inputs)
    assert batch[0].grad is None


def test_a_diagnosis_needs_no_gradient_mode() -> None:
    model = small_net()
    torch.manual_seed(1)
    expected = diagnose(model, images(), cross_entropy).layers[0].average_gradient
    torch.manual_seed(1)
    with torch.no_grad():
        found = diagnose(model, images(), cross_entropy).layers[0].average_gradient
        assert not torch.is_grad_enabled()
    assert found == expected


def failing_loss(error: BaseException) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(*_: Tensor) -> Tensor:
        raise error

    return loss


@pytest.mark.parametrize(
    ("where", "error", "told"),
    [
        ("model", RuntimeError("boom"), PwsError),
        ("model", KeyboardInterrupt(), KeyboardInterrupt),
        ("model", ZeroDivisionError("boom"), ZeroDivisionError),
        ("loss", RuntimeError("boom"), PwsError),
        ("loss", KeyboardInterrupt(), KeyboardInterrupt),
        ("loss", AssertionError("boom"), PwsError),
        ("backward", RuntimeError("boom"), PwsError),
        ("backward", KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__),
)
def test_the_model_is_left_as_it_was_after_an_error(
    where: str, error: BaseException, told: type[BaseException]
) -> None:
    model, loss = prepared(True), cross_entropy
    if where == "model":
        model.fail = error
    elif where == "loss":
        loss = failing_loss(error)
    else:

        def loss(outputs: Tensor, targets: Tensor) -> Tensor:
            outputs.register_hook(failing_loss(error))
            return cross_entropy(outputs, targets)

    batch, before = images(), state(model)
    with pytest.raises(told, match="boom" if error.args else None):
        diagnose(model, batch, loss)
    assert state(model) == before


def train(model: nn.Module, diagnosed: bool) -> list[Tensor]:
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(4):
        batch = images()
        if diagnosed:
            diagnose(model, (batch[0] * 3, batch[1]), cross_entropy)
        optimizer.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).backward()
        if diagnosed:
            diagnose(model, batch, cross_entropy)
        optimizer.step()
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("conv", [nn.Conv2d, pws.Conv2d, lambda *a: weight_norm(nn.Conv2d(*a))])
def test_training_is_bitwise_the_same(conv: Callable[..., nn.Module]) -> None:
    model = small_net(conv)
    initial = [p.clone() for p in model.parameters()]
    copy = deepcopy(model)
    ours, theirs = train(model, True), train(copy, False)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(initial, ours[: len(initial)], strict=True) if a.dim() > 1)


@pytest.mark.parametrize("training", [True, False])
def test_a_pending_graph_still_backpropagates(training: bool) -> None:
    model = small_net().train(training)
    expected, copy = images(), deepcopy(model)
    torch.manual_seed(5)
    pending = cross_entropy(model(expected[0]), expected[1])
    torch.manual_seed(5)
    cross_entropy(copy(expected[0]), expected[1]).backward()
    diagnose(model, images(), cross_entropy)
    pending.backward()
    for mine, theirs in zip(model.parameters(), copy.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_two_diagnoses_are_the_same() -> None:
    model, batch = small_net(), images()
    first, second = (diagnose(model, batch, cross_entropy).to_dict(filters=True) for _ in range(2))
    assert first == second
    assert first["loss"] > 0
