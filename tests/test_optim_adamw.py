"""`pws.optim.AdamW` against `torch.optim.AdamW` on the layer form, and its bound on the step that is taken."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn
from torch.optim import lr_scheduler
from twins import BOUND, assert_alike, backward, kinds, layer_form, mixed, positions, single, train

import pws

STEPS = 50


def cut(model: nn.Module, before: dict[str, list[Tensor]], bound: float) -> None:
    """Shorten the step that each layer has taken."""
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if own:
            changes = [p.detach() - old for p, old in zip(own, before[name], strict=True)]
            length = float(torch.cat([change.flatten() for change in changes]).norm())
            for p, old, change in zip(own, before[name], changes, strict=True):
                p.data.copy_(old + change * min(1.0, bound / length))


def train_twin(twin: nn.Module, theirs: torch.optim.Optimizer, data: Any, bound: float, schedule: Any = None) -> None:
    """As `train`, each step cut to the bound after it is taken."""
    for i in range(STEPS):
        theirs.zero_grad()
        backward(twin, data[i % len(data)])
        before = {
            name: [p.detach().clone() for p in module.parameters(recurse=False)]
            for name, module in twin.named_modules()
        }
        theirs.step()
        group = theirs.param_groups[0]
        cut(twin, before, bound * group["lr"] / group.get("initial_lr", group["lr"]))
        if schedule is not None:
            schedule.step()


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_of_layer(kind: str) -> None:
    model, data = single(kind)
    twin = layer_form(model)
    ours = pws.optim.AdamW(pws.param_groups(model, lr=0.01, weight_decay=0.1), step_bound=None)
    theirs = torch.optim.AdamW(pws.param_groups(twin, lr=0.01, weight_decay=0.1))
    train(model, ours, data)
    train(twin, theirs, data)
    assert_alike(model, ours, twin)


SETTINGS = [
    ({"lr": 0.01}, {}),
    ({"lr": 0.03, "weight_decay": 0.3}, {}),
    ({"lr": 0.01, "weight_decay": 0.01, "scale_lr_factor": 0.25}, {"betas": (0.5, 0.9), "eps": 1e-3}),
    ({"lr": 0.01, "scale_lr_factor": 0.0}, {"betas": (0.0, 0.99)}),
]


@pytest.mark.parametrize(("rates", "settings"), SETTINGS, ids=str)
def test_every_setting_without_bound(rates: dict[str, float], settings: dict[str, Any]) -> None:
    model, data = mixed()
    twin = layer_form(model)
    ours = pws.optim.AdamW(pws.param_groups(model, **rates), step_bound=None, **settings)
    theirs = torch.optim.AdamW(pws.param_groups(twin, **rates), **settings)
    train(model, ours, data)
    train(twin, theirs, data)
    assert_alike(model, ours, twin)


@pytest.mark.parametrize("bound", [BOUND, 1e-3])
@pytest.mark.parametrize(("rates", "settings"), SETTINGS, ids=str)
def test_every_setting_with_a_bound(rates: dict[str, float], settings: dict[str, Any], bound: float) -> None:
    model, data = mixed()
    twin = layer_form(model)
    ours = pws.optim.AdamW(pws.param_groups(model, **rates), step_bound=bound, **settings)
    theirs = torch.optim.AdamW(pws.param_groups(twin, **rates), **settings)
    train(model, ours, data)
    train_twin(twin, theirs, data, bound)
    assert_alike(model, ours, twin)


@pytest.mark.parametrize("lr", [1e-3, 10.0])
def test_the_step_that_is_taken_has_the_unbounded_steps_length_or_the_bounds(lr: float) -> None:
    model, data = mixed()
    free = deepcopy(model)
    bounded = pws.optim.AdamW(model, lr=lr, step_bound=BOUND)
    unbounded = pws.optim.AdamW(free, lr=lr, step_bound=None)
    seen = []
    for batch in data:
        unbounded.load_state_dict(deepcopy(bounded.state_dict()))
        free.load_state_dict(model.state_dict())
        for net, optimizer in ((model, bounded), (free, unbounded)):
            optimizer.zero_grad()
            backward(net, batch)
        if not bounded.state:
            bounded.step()  # adopts
            continue
        before = positions(model, bounded)
        bounded.step()
        unbounded.step()
        taken, asked = positions(model, bounded), positions(free, unbounded)
        for name, start in before.items():
            wanted = float((asked[name] - start).norm())
            seen.append(wanted)
            assert float((taken[name] - start).norm()) == pytest.approx(min(BOUND, wanted), rel=1e-9)
    assert max(seen) > BOUND if lr == 10 else min(seen) < BOUND


def test_decay_is_decoupled_and_leaves_alpha_and_bias_alone() -> None:
    model, data = single("conv2d")
    optimizer = pws.optim.AdamW(model, lr=0.1, weight_decay=0.5, step_bound=None)
    train(model, optimizer, data, 1)
    layer = model[0]
    state = optimizer.state[layer.weight]
    for average in ("exp_avg", "alpha_exp_avg"):
        state[average].zero_()
    optimizer.state[layer.bias]["exp_avg"].zero_()
    w, alpha, bias = state["w"].clone(), state["alpha"].clone(), layer.bias.detach().clone()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert_close(state["w"], w * (1 - 0.1 * 0.5), "float64")
    assert torch.equal(state["alpha"], alpha)
    assert torch.equal(layer.bias, bias)


@pytest.mark.parametrize("bound", [BOUND, 1e-3])
def test_the_bound_is_for_the_largest_rate_and_shrinks_with_the_schedule(bound: float) -> None:
    model, data = mixed()
    twin = layer_form(model)
    ours = pws.optim.AdamW(pws.param_groups(model, lr=0.02, weight_decay=0.1), step_bound=bound)
    theirs = torch.optim.AdamW(pws.param_groups(twin, lr=0.02, weight_decay=0.1))
    schedules = [lr_scheduler.CosineAnnealingLR(optimizer, STEPS) for optimizer in (ours, theirs)]
    train(model, ours, data, schedule=schedules[0])
    train_twin(twin, theirs, data, bound, schedules[1])
    assert_alike(model, ours, twin)


def test_a_schedule_with_cycled_betas() -> None:
    model, data = mixed()
    twin = layer_form(model)
    ours = pws.optim.AdamW(pws.param_groups(model, lr=0.02), step_bound=None)
    theirs = torch.optim.AdamW(pws.param_groups(twin, lr=0.02))
    schedules = [lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=STEPS + 1) for optimizer in (ours, theirs)]
    train(model, ours, data, schedule=schedules[0])
    train(twin, theirs, data, schedule=schedules[1])
    assert ours.param_groups[0]["betas"] == theirs.param_groups[0]["betas"] != (0.9, 0.999)
    assert_alike(model, ours, twin)


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_a_half_of_a_layer_frozen_for_a_while(which: str) -> None:
    """Each parameter counts its own steps, as under torch's AdamW."""
    model, data = mixed()
    twin = layer_form(model)
    ours = pws.optim.AdamW(model, lr=0.01, weight_decay=0, step_bound=None)
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0)
    for frozen in (False, True, False, True, False):
        model[0].get_parameter(which).requires_grad_(not frozen)
        for name in (which, "alpha") if which == "weight" else (which,):
            twin[0].get_parameter(name).requires_grad_(not frozen)
        train(model, ours, data, 5)
        train(twin, theirs, data, 5)
    assert_alike(model, ours, twin)


def test_a_layer_without_gradient_in_some_steps() -> None:
    model, data = mixed()
    twin = layer_form(model)
    ours = pws.optim.AdamW(model, lr=0.01, weight_decay=0.1, step_bound=None)
    theirs = torch.optim.AdamW(pws.param_groups(twin, lr=0.01, weight_decay=0.1))
    for i in range(12):
        for net, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            backward(net, data[i % 4])
            for number in {0: [0, 3], 1: [5], 2: []}[i % 3]:
                net[number].zero_grad(set_to_none=True)
            optimizer.step()
    assert_alike(model, ours, twin)


def test_float32_by_the_fused_step_follows_float64() -> None:
    model, data = mixed()
    narrow = deepcopy(model).float()
    ours, wide = pws.optim.AdamW(narrow, lr=0.01, eps=1e-4), pws.optim.AdamW(model, lr=0.01, eps=1e-4)
    train(narrow, ours, [(x.float(), y) for x, y in data], 20)
    train(model, wide, data, 20)
    for name, parameter in narrow.named_parameters():
        assert_close(parameter, model.get_parameter(name), "trajectory float32")
