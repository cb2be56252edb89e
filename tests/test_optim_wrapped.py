"""`pws.optim.Wrapped`: the optimizers that pws has itself give the same steps, any other keeps the promises."""

from __future__ import annotations

import io
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from timm.optim import Lamb, Lion
from timm.optim import Muon as TimmMuon
from tolerances import assert_close
from torch import nn
from torch.optim import lr_scheduler
from twins import (
    BOUND,
    assert_alike,
    assert_standardized,
    backward,
    batches,
    layer_form,
    mixed,
    positions,
    same_bits,
    snapshot,
    train,
)

import pws
from pws._mark import mark
from pws.optim import AdamW, Wrapped

RATES = {"lr": 0.02, "weight_decay": 0.05, "scale_lr_factor": 0.5}
MUON = {"lr": 0.02, "scales": partial(torch.optim.AdamW, lr=1e-2)}
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
    "Muon": (torch.optim.Muon, MUON),
    "timm's Muon": (TimmMuon, {"lr": 0.02}),
    "timm's Lamb": (Lamb, {"lr": 0.02}),
    "timm's Lion": (Lion, {"lr": 0.01}),
    "AdamW, fused": (torch.optim.AdamW, {"lr": 0.01, "fused": True}),
}


def matrices(dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, Any]:
    """Marked layers, and plain ones whose weights are matrices."""
    model = nn.Sequential(
        *(mark(nn.Conv2d(3, 8, 3)), nn.Tanh(), mark(nn.ConvTranspose2d(8, 6, 2, groups=2)), nn.Tanh(), nn.Flatten()),
        *(nn.Linear(150, 8), nn.LayerNorm(8), nn.Tanh(), mark(nn.Linear(8, 3), gain="linear")),
    ).to(dtype)
    return model, batches((3, 6, 6), dtype=dtype)


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_torchs_sgd_is_ours_without_bound(settings: dict[str, Any]) -> None:
    model, data = mixed()
    twin = deepcopy(model)
    ours = Wrapped(pws.param_groups(model, **RATES), torch.optim.SGD, step_bound=None, **settings)
    theirs = pws.optim.SGD(pws.param_groups(twin, **RATES), step_bound=None, **settings)
    train(model, ours, data)
    train(twin, theirs, data)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(one, other, "trajectory")


@pytest.mark.parametrize("bound", [None, BOUND, 1e-3])
def test_torchs_adamw_is_ours(bound: float | None) -> None:
    model, data = mixed()
    twin = deepcopy(model)
    ours = Wrapped(pws.param_groups(model, **RATES), torch.optim.AdamW, step_bound=bound)
    theirs = AdamW(pws.param_groups(twin, **RATES), step_bound=bound)
    train(model, ours, data, schedule=lr_scheduler.LinearLR(ours, 1.0, 0.1, total_iters=40))
    train(twin, theirs, data, schedule=lr_scheduler.LinearLR(theirs, 1.0, 0.1, total_iters=40))
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(one, other, "trajectory")


def test_an_optimizer_without_bound_is_itself_on_the_layer_form() -> None:
    model, data = mixed()
    twin = layer_form(model)
    ours = Wrapped(pws.param_groups(model, **RATES), torch.optim.RMSprop, step_bound=None, momentum=0.5)
    theirs = torch.optim.RMSprop(pws.param_groups(twin, **RATES), momentum=0.5)
    train(model, ours, data)
    train(twin, theirs, data)
    assert_alike(model, ours, twin)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_kernel_stays_standardized_the_loss_falls_and_steps_are_bounded(name: str) -> None:
    cls, settings = OPTIMIZERS[name]
    model, data = matrices()
    optimizer = Wrapped(model, cls, step_bound=0.1, **settings)
    losses = train(model, optimizer, data, 1)
    for i in range(40):
        before = positions(model, optimizer)
        losses += train(model, optimizer, [data[i % 4]], 1)
        for layer, position in positions(model, optimizer).items():
            assert 0 < float((position - before[layer]).norm()) <= 0.1 * (1 + 1e-4)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert_standardized(model, optimizer)


@pytest.mark.parametrize("name", ["RMSprop", "Muon", "timm's Lion"])
def test_any_rate_trains_with_the_bound(name: str) -> None:
    cls, settings = OPTIMIZERS[name]
    model, data = matrices()
    losses = train(model, Wrapped(model, cls, step_bound=0.03, **settings | {"lr": 100.0}), data, 40)
    assert all(torch.tensor(losses).isfinite())
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_a_schedule_reaches_the_inner_optimizer() -> None:
    model, data = mixed()
    twin = layer_form(model)
    ours = Wrapped(pws.param_groups(model, **RATES), torch.optim.AdamW, step_bound=None)
    theirs = torch.optim.AdamW(pws.param_groups(twin, **RATES))
    for form, optimizer in ((model, ours), (twin, theirs)):
        peaks = [group["lr"] for group in optimizer.param_groups]
        train(form, optimizer, data, 30, schedule=lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=31))
    assert_alike(model, ours, twin)


def test_the_scales_optimizer_keeps_its_ratio_to_the_schedule() -> None:
    model, data = matrices()
    optimizer = Wrapped(model, torch.optim.Muon, step_bound=None, **MUON)
    schedule = lr_scheduler.StepLR(optimizer, 1, 0.0)
    train(model, optimizer, data, 1, schedule=schedule)
    before = positions(model, optimizer)
    train(model, optimizer, data, 1)
    assert all(torch.equal(position, before[name]) for name, position in positions(model, optimizer).items())


def test_alphas_and_biases_do_not_decay_under_a_scales_optimizer_that_decays() -> None:
    model, data = matrices()
    settings = MUON | {"scales": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5)}
    optimizer = Wrapped(model, torch.optim.Muon, step_bound=None, **settings)
    train(model, optimizer, data, 1)
    for inner in optimizer._inner:
        for state in inner.state.values():
            for name in ("exp_avg", "momentum_buffer"):
                if name in state:
                    state[name].zero_()
    before = [optimizer.state[model[0].weight]["alpha"].clone(), model[0].bias.detach().clone()]
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert same_bits(before, [optimizer.state[model[0].weight]["alpha"], model[0].bias])


def test_a_layer_without_gradient_in_a_step_stays() -> None:
    model, data = mixed()
    twin = layer_form(model)
    ours = Wrapped(pws.param_groups(model, **RATES), torch.optim.AdamW, step_bound=None)
    theirs = torch.optim.AdamW(pws.param_groups(twin, **RATES))
    for i in range(12):
        for net, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            backward(net, data[i % 4])
            for number in {0: [0, 3], 1: [5], 2: []}[i % 3]:
                net[number].zero_grad(set_to_none=True)
            optimizer.step()
    assert_alike(model, ours, twin)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_from_a_saved_state_to_the_same_bits(name: str) -> None:
    cls, settings = OPTIMIZERS[name]
    model, data = matrices()
    optimizer = Wrapped(model, cls, **settings)
    train(model, optimizer, data, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    train(model, optimizer, data, 5)

    other, _ = matrices()
    again = Wrapped(other, cls, **settings)
    train(other, again, data, 2)  # what it has by then goes
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    train(other, again, data, 5)
    assert same_bits(snapshot(model, optimizer), snapshot(other, again))


def test_a_copy_goes_its_own_way() -> None:
    model, data = matrices()
    optimizer = Wrapped(model, torch.optim.AdamW, lr=0.01)
    train(model, optimizer, data, 3)
    copied, copy = deepcopy((model, optimizer))
    before = snapshot(model, optimizer)
    train(copied, copy, data, 5)
    assert same_bits(before, snapshot(model, optimizer))
    train(model, optimizer, data, 5)
    assert same_bits(snapshot(copied, copy), snapshot(model, optimizer))


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model, data = matrices()
    optimizer = Wrapped(model, torch.optim.AdamW, lr=0.01)
    train(model, optimizer, data, 2)
    before = snapshot(model, optimizer)
    backward(model, data[0])
    model[2].weight.grad[0, 0] = torch.inf
    with pytest.raises(pws.optim.NonFiniteGradientError, match=r"first: '2.weight'"):
        optimizer.step()
    assert same_bits(before, snapshot(model, optimizer))


def test_an_optimizer_of_matrices_only_asks_for_scales() -> None:
    with pytest.raises(pws.PwsError, match=r"Muon refuses its parameters or settings .* needs scales="):
        Wrapped(matrices()[0], torch.optim.Muon, lr=0.1)


def test_a_setting_that_the_optimizer_does_not_know_is_its_error_in_our_words() -> None:
    with pytest.raises(pws.PwsError, match=r"the optimizer RMSprop refuses .*unexpected keyword argument 'beta'"):
        Wrapped(matrices()[0], torch.optim.RMSprop, lr=0.1, beta=1)


def test_groups_join_only_at_the_start() -> None:
    optimizer = Wrapped(matrices()[0], torch.optim.RMSprop, lr=0.1)
    with pytest.raises(pws.PwsError, match="takes all its groups when it is made"):
        optimizer.add_param_group(pws.param_groups(nn.Linear(2, 2), lr=1)[0])
