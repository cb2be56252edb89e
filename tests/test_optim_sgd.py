"""`pws.optim.SGD` against `torch.optim.SGD` on the layer form: the same trajectory."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import nn
from torch.optim import lr_scheduler
from twins import BOUND, assert_alike, backward, batches, clip, kinds, layer_form, mixed, positions, single, train

import pws
from pws._mark import mark

STEPS = 50


def both(
    model: nn.Module,
    data: Any,
    bound: float | None,
    rates: dict[str, float],
    schedule: Callable[[torch.optim.Optimizer], Any] = lambda _: None,
    **settings: Any,
) -> list[float]:
    """Train both forms and compare; the lengths of all layers' gradient steps."""
    twin = layer_form(model)
    ours = pws.optim.SGD(pws.param_groups(model, **rates), step_bound=bound, **settings)
    theirs = torch.optim.SGD(pws.param_groups(twin, **rates), **settings)
    lengths: list[float] = []
    bounded = (lambda: lengths.extend(clip(twin, theirs, bound))) if bound is not None else (lambda: None)
    mine = train(model, ours, data, STEPS, schedule=schedule(ours))
    other = train(twin, theirs, data, STEPS, bounded, schedule=schedule(theirs))
    assert_close(torch.tensor(mine, dtype=torch.float64), torch.tensor(other, dtype=torch.float64), "trajectory")
    assert_alike(model, ours, twin)
    return lengths


@pytest.mark.parametrize("bound", [BOUND, None])
@pytest.mark.parametrize("kind", kinds())
def test_every_kind_of_layer(kind: str, bound: float | None) -> None:
    model, data = single(kind)
    lengths = both(model, data, bound, {"lr": 0.3, "weight_decay": 0.01}, momentum=0.9)
    assert bound is None or max(lengths) > bound


@pytest.mark.parametrize("bound", [BOUND, None])
@pytest.mark.parametrize(
    ("rates", "settings"),
    [
        ({"lr": 0.3}, {}),
        ({"lr": 0.3}, {"momentum": 0.9}),
        ({"lr": 0.3}, {"momentum": 0.9, "nesterov": True}),
        ({"lr": 0.3, "weight_decay": 0.05}, {}),
        ({"lr": 0.3, "weight_decay": 0.05, "scale_lr_factor": 0.25}, {"momentum": 0.8, "nesterov": True}),
        ({"lr": 0.3, "scale_lr_factor": 0.0}, {"momentum": 0.9}),
    ],
    ids=str,
)
def test_every_setting(rates: dict[str, float], settings: dict[str, Any], bound: float | None) -> None:
    """In a model with plain layers and a norm."""
    model, data = mixed()
    lengths = both(model, data, bound, rates, **settings)
    assert bound is None or min(lengths) < bound < max(lengths)


def one_cycle(optimizer: torch.optim.Optimizer) -> lr_scheduler.OneCycleLR:
    peaks = [group["lr"] for group in optimizer.param_groups]
    return lr_scheduler.OneCycleLR(optimizer, max_lr=peaks, total_steps=STEPS + 1, base_momentum=0.5)


@pytest.mark.parametrize("bound", [BOUND, None])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda sgd: lr_scheduler.StepLR(sgd, 10, 0.5),
        lambda sgd: lr_scheduler.CosineAnnealingLR(sgd, STEPS),
        lambda sgd: lr_scheduler.LinearLR(sgd, 0.01, total_iters=20),
        one_cycle,
    ],
    ids=["step", "cosine", "warmup", "one cycle with momentum"],
)
def test_schedules_whose_steps_are_bounded_at_the_peak_rate(schedule: Callable[..., Any], bound: float | None) -> None:
    model, data = mixed()
    rates = {"lr": 0.3, "weight_decay": 0.01, "scale_lr_factor": 0.5}
    lengths = both(model, data, bound, rates, schedule, momentum=0.9)
    assert bound is None or min(lengths) < bound < max(lengths)


def test_a_plateau_lowers_the_rate_of_both_forms() -> None:
    model, data = mixed()
    twin = layer_form(model)
    ours = pws.optim.SGD(pws.param_groups(model, lr=0.2), step_bound=None)
    theirs = torch.optim.SGD(pws.param_groups(twin, lr=0.2))
    for net, optimizer in ((model, ours), (twin, theirs)):
        plateau = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
        for loss in (1.0, 2.0, 3.0, 4.0):
            train(net, optimizer, data, 5)
            plateau.step(loss)
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"] == pytest.approx(0.2e-3)
    assert_alike(model, ours, twin)


def test_clip_grad_is_that_bound_in_single_precision() -> None:
    model, data = mixed()
    twin = layer_form(model)
    ours = pws.optim.SGD(model, lr=0.3)
    theirs = torch.optim.SGD(pws.param_groups(twin, lr=0.3))
    train(model, ours, data, 20)
    train(twin, theirs, data, 20, lambda: pws.clip_grad(twin, theirs))
    assert_alike(model, ours, twin, "single precision bound")


@pytest.mark.parametrize("lr", [0.05, 1e4])
def test_without_momentum_and_decay_no_layers_step_is_longer_than_the_bound(lr: float) -> None:
    model, data = mixed()
    optimizer = pws.optim.SGD(model, lr=lr)
    train(model, optimizer, data, 1)
    before = positions(model, optimizer)
    train(model, optimizer, data[1:], 1)
    for name, position in positions(model, optimizer).items():
        length = float((position - before[name]).norm())
        assert length <= 0.3 * (1 + 1e-9)
        assert lr < 1 or length == pytest.approx(0.3)


def test_float32_by_the_fused_step_follows_float64() -> None:
    model, data = mixed()
    narrow, narrow_data = deepcopy(model).float(), [(x.float(), y) for x, y in data]
    ours = pws.optim.SGD(narrow, lr=0.1, momentum=0.9)
    wide = pws.optim.SGD(model, lr=0.1, momentum=0.9)
    train(narrow, ours, narrow_data, 20)
    train(model, wide, data, 20)
    for name, parameter in narrow.named_parameters():
        assert parameter.dtype == torch.float32
        assert_close(parameter, model.get_parameter(name), "trajectory float32")


def test_several_groups_with_rates_of_their_own() -> None:
    model, data = mixed()
    twin = layer_form(model)
    parts = [slice(0, 5), slice(5, None)]
    rates = [{"lr": 0.02, "scale_lr_factor": 0.5}, {"lr": 0.3, "weight_decay": 0.01}]

    def groups(net: nn.Module) -> list[dict[str, Any]]:
        return [group for part, rate in zip(parts, rates, strict=True) for group in pws.param_groups(net[part], **rate)]

    ours, theirs = pws.optim.SGD(groups(model), momentum=0.9), torch.optim.SGD(groups(twin), momentum=0.9)
    assert {group["lr"] for group in ours.param_groups} == {0.02, 0.01, 0.3}
    train(model, ours, data)
    train(twin, theirs, data, before=lambda: clip(twin, theirs))
    assert_alike(model, ours, twin)


def test_groups_whose_biases_have_a_momentum_of_their_own() -> None:
    """Then a bias moves, and is bounded, as a layer of its own."""
    model, data = mixed()
    twin = layer_form(model)
    optimizers = []
    for form, cls, more in ((model, pws.optim.SGD, {"step_bound": None}), (twin, torch.optim.SGD, {})):
        groups = pws.param_groups(form, lr=0.1)
        for group in groups:
            group["momentum"] = 0.5 if group["name"] == "scales" else 0.9
        optimizers.append(cls(groups, momentum=0.9, **more))
    alphas = {id(module.alpha) for module in twin.modules() if hasattr(module, "alpha")}
    moved = next(group for group in optimizers[1].param_groups if group["name"] == "scales")
    alone = [p for p in moved["params"] if id(p) in alphas]
    moved["params"] = [p for p in moved["params"] if id(p) not in alphas]
    optimizers[1].add_param_group({"params": alone, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0})
    train(model, optimizers[0], data)
    train(twin, optimizers[1], data)
    assert_alike(model, optimizers[0], twin)


def test_accumulated_gradients_are_those_of_a_large_batch() -> None:
    model = nn.Sequential(mark(nn.Linear(6, 8)), nn.Tanh(), mark(nn.Linear(8, 3))).double()
    twin = deepcopy(model)
    data = batches((6,), count=8)
    ours, theirs = (pws.optim.SGD(net, lr=0.3, momentum=0.9) for net in (model, twin))
    for i in range(0, 8, 2):
        ours.zero_grad()
        for x, y in data[i : i + 2]:
            (nn.functional.cross_entropy(model(x), y) / 2).backward()
        ours.step()
        theirs.zero_grad()
        backward(twin, (torch.cat([data[i][0], data[i + 1][0]]), torch.cat([data[i][1], data[i + 1][1]])))
        theirs.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(one, other, "float64")


def test_a_layer_without_gradient_in_some_steps() -> None:
    """It stays where it is, momentum and all, as under torch's SGD."""
    model, data = mixed()
    twin = layer_form(model)
    ours = pws.optim.SGD(model, lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD(pws.param_groups(twin, lr=0.1), momentum=0.9)
    for i in range(12):
        for net, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            backward(net, data[i % 4])
            for number in {0: [0, 3], 1: [5], 2: []}[i % 3]:
                net[number].zero_grad(set_to_none=True)
            if i % 4 == 3:
                net[10].bias.grad = None
            if optimizer is theirs:
                clip(net, theirs)
            optimizer.step()
    assert_alike(model, ours, twin)


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_a_half_of_a_layer_frozen_for_a_while(which: str) -> None:
    model, data = mixed()
    twin = layer_form(model)
    ours = pws.optim.SGD(model, lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD(pws.param_groups(twin, lr=0.1), momentum=0.9)
    for frozen in (False, True, False):
        model[0].get_parameter(which).requires_grad_(not frozen)
        for name in (which, "alpha") if which == "weight" else (which,):
            twin[0].get_parameter(name).requires_grad_(not frozen)
        train(model, ours, data, 5)
        train(twin, theirs, data, 5, lambda: clip(twin, theirs))
    assert_alike(model, ours, twin)


def test_tied_weights_move_once_by_the_sum_of_their_gradients() -> None:
    first, second = mark(nn.Linear(6, 6)), mark(nn.Linear(6, 6))
    second.weight = first.weight
    model = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(6, 3)).double()
    twin = layer_form(model)
    twin[2].weight, twin[2].alpha = twin[0].weight, twin[0].alpha
    ours = pws.optim.SGD(model, lr=0.2, momentum=0.9)
    theirs = torch.optim.SGD(pws.param_groups(twin, lr=0.2), momentum=0.9)

    def bounded() -> None:
        third = nn.Module()
        third.bias = twin[2].bias
        clip(nn.ModuleList([twin[0], third, twin[4]]), theirs)

    data = batches((6,))
    train(model, ours, data)
    train(twin, theirs, data, before=bounded)
    assert model[0].weight is model[2].weight
    assert_alike(model, ours, twin)


def test_a_layer_that_joins_later() -> None:
    model, data = mixed()
    pws.optim.SGD(model, lr=0.1)  # takes the means out of all kernels
    twin = layer_form(model)
    ours = pws.optim.SGD(model[:5], lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD(pws.param_groups(twin[:5], lr=0.1), momentum=0.9)
    for joined in (False, True):
        if joined:
            for net, optimizer in ((model, ours), (twin, theirs)):
                net.zero_grad()
                for group in pws.param_groups(net[5:], lr=0.05):
                    optimizer.add_param_group(group)
        train(model, ours, data, 10)
        train(twin, theirs, data, 10, lambda: clip(twin, theirs))
    assert_alike(model, ours, twin)


def test_a_parameter_of_no_layer_joins_as_it_is() -> None:
    model, data = mixed()
    scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = pws.optim.SGD(model, lr=0.1, step_bound=None)
    optimizer.add_param_group({"params": [scale], "lr": 0.5, "standardized": False})
    (nn.functional.cross_entropy(scale * model(data[0][0]), data[0][1]) + 3 * scale).backward()
    expected = 1 - 0.5 * scale.grad.item()
    optimizer.step()
    assert_close(scale.item(), expected, "float64")
