"""`step_in_backward=True`: the same steps, taken in the backward pass, and no gradient is left."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn
from twins import backward, batches, mixed, same_bits, snapshot, train

import pws
from pws._mark import mark
from pws.optim import SGD, AdamW, NonFiniteGradientError

Make = Callable[..., torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda model, **more: SGD(
        pws.param_groups(model, lr=0.1, weight_decay=0.01, scale_lr_factor=0.5), momentum=0.9, nesterov=True, **more
    ),
    "adamw": lambda model, **more: AdamW(model, lr=0.01, weight_decay=0.1, **more),
}
optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


@optimizers
@pytest.mark.parametrize("bound", [0.01, None])
@pytest.mark.parametrize(("dtype", "row"), [(torch.float64, "float64"), (torch.float32, "trajectory float32")], ids=str)
def test_the_trajectory_is_that_of_steps_after_the_backward_pass(
    make: Make, bound: float | None, dtype: torch.dtype, row: str
) -> None:
    model, data = mixed(dtype)
    twin = deepcopy(model)
    ours, theirs = make(model, step_bound=bound, step_in_backward=True), make(twin, step_bound=bound)
    train(model, ours, data, 12)
    train(twin, theirs, data, 12)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(one, other, row)
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours.state[parameter].keys() == theirs.state[other].keys()


@optimizers
def test_after_the_backward_pass_all_layers_have_moved_and_no_gradient_is_left(make: Make) -> None:
    model, data = mixed(torch.float32)
    optimizer = make(model, step_in_backward=True)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, data[0])
    assert all(parameter.grad is None for parameter in model.parameters())
    moved = [p.detach().clone() for p in model.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(before, moved, strict=True))
    optimizer.step()
    assert same_bits(moved, list(model.parameters()))


@optimizers
def test_the_schedule_acts_from_step_to_step(make: Make) -> None:
    model, data = mixed()
    twin = deepcopy(model)
    ours, theirs = make(model, step_in_backward=True), make(twin)
    for net, optimizer in ((model, ours), (twin, theirs)):
        train(net, optimizer, data, 8, schedule=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7))
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(one, other, "float64")


@optimizers
def test_a_second_backward_pass_before_the_step_is_refused(make: Make) -> None:
    model, data = mixed()
    optimizer = make(model, step_in_backward=True)
    backward(model, data[0])
    with pytest.raises(
        pws.PwsError, match=r"a second backward pass came before step\(\).*Make the optimizer without it"
    ):
        backward(model, data[1])
    optimizer.step()
    train(model, optimizer, data, 2)


@optimizers
def test_a_grad_scaler_is_refused(make: Make) -> None:
    model = nn.Sequential(mark(nn.Linear(4, 3)))
    optimizer = make(model, step_in_backward=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(2, 4)).sum()).backward()
    with pytest.raises(pws.PwsError, match="but a GradScaler unscales and checks all of them before the step"):
        scaler.step(optimizer)


@optimizers
def test_several_processes_are_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(
        pws.PwsError, match=r"several processes average theirs after that. Make the optimizer without it"
    ):
        make(mixed()[0], step_in_backward=True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    make(mixed()[0], step_in_backward=True)


class Unbiased(nn.Module):
    """A layer whose bias is not used in every other pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.uses_bias = mark(nn.Linear(6, 3)), False

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.layer.weight, self.layer.bias if self.uses_bias else None)


@optimizers
def test_a_layer_with_a_part_that_got_no_gradient_moves_at_the_end(make: Make) -> None:
    model = Unbiased().double()
    twin = deepcopy(model)
    ours, theirs = make(model, step_in_backward=True), make(twin)
    data = batches((6,))
    for i in range(6):
        for net, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            net.uses_bias = i % 2 == 1
            backward(net, data[i % 4])
            optimizer.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(one, other, "float64")
        assert one.grad is None


@optimizers
def test_half_of_a_layer_frozen_later(make: Make) -> None:
    model, data = mixed()
    twin = deepcopy(model)
    ours, theirs = make(model, step_in_backward=True), make(twin)
    for frozen in (False, True, False):
        for net, optimizer in ((model, ours), (twin, theirs)):
            net[0].weight.requires_grad_(not frozen)
            net[10].bias.requires_grad_(not frozen)
            train(net, optimizer, data, 3)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(one, other, "float64")


@optimizers
def test_tied_weights_move_when_all_of_their_gradient_is_there(make: Make) -> None:
    first, second = mark(nn.Linear(6, 6)), mark(nn.Linear(6, 6))
    second.weight = first.weight
    model = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(6, 3)).double()
    twin = deepcopy(model)
    ours, theirs = make(model, step_in_backward=True), make(twin)
    data = batches((6,))
    train(model, ours, data, 8)
    train(twin, theirs, data, 8)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(one, other, "float64")


@optimizers
def test_a_layer_that_joins_later_steps_in_the_backward_pass_too(make: Make) -> None:
    model, data = mixed()
    optimizer = make(model[:5], step_in_backward=True)
    train(model, optimizer, data, 2)
    for group in pws.param_groups(model[5:], lr=0.05):
        optimizer.add_param_group(group)
    model.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, data[0])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.step()


@optimizers
@pytest.mark.parametrize(
    "copied_by", [deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_copies_step_in_their_own_backward_passes(make: Make, copied_by: Callable[[Any], Any]) -> None:
    model, data = mixed(torch.float32)
    optimizer = make(model, step_in_backward=True)
    train(model, optimizer, data, 2)
    copied, copy = copied_by((model, optimizer))
    before = snapshot(model, optimizer)
    train(copied, copy, data, 3)
    assert all(parameter.grad is None for parameter in copied.parameters())
    assert same_bits(before, snapshot(model, optimizer))
    train(model, optimizer, data, 3)
    assert same_bits(snapshot(copied, copy), snapshot(model, optimizer))


@optimizers
def test_a_gradient_that_is_not_finite_stops_the_backward_pass_and_training_can_go_on(make: Make) -> None:
    model, data = mixed(torch.float32)
    optimizer = make(model, step_in_backward=True)
    train(model, optimizer, data, 2)
    before = snapshot(model, optimizer)
    bad = (torch.full_like(data[0][0], math.nan), data[0][1])
    model.eval()  # a norm would keep the NaN in its statistics
    with pytest.raises(NonFiniteGradientError, match=r"first: '10.weight'"):
        backward(model, bad)
    assert same_bits(before, snapshot(model, optimizer))
    model.train()
    losses = train(model, optimizer, data, 4)
    assert all(map(math.isfinite, losses))


@optimizers
def test_a_closure_that_runs_the_backward_pass(make: Make) -> None:
    model, data = mixed()
    twin = deepcopy(model)
    ours, theirs = make(model, step_in_backward=True), make(twin)
    for batch in data:
        theirs.zero_grad()
        assert ours.step(lambda batch=batch: backward(model, batch)) == theirs.step(
            lambda batch=batch: backward(twin, batch)
        )
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(one, other, "float64")


def test_clipping_by_pws_finds_out_that_no_gradient_is_left() -> None:
    layer = pws.mark(nn.Linear(4, 3), gain="linear")
    optimizer = pws.optim.SGD(layer, lr=0.1, step_in_backward=True)
    layer(torch.ones(2, 4)).sum().backward()
    with pytest.raises(pws.PwsError, match="no gradient is left to clip"):
        pws.clip_grad(layer, optimizer)
