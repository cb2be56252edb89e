"""Opacus around the optimizer form: every way it has to get a gradient per sample, and the bound under its noise."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Final

import pytest
import torch
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from tolerances import assert_close
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from twins import positions

import pws
import pws.private
from pws._mark import mark

MODES: Final = ("hooks", "functorch", "ew", "ghost")
LARGE: Final = 1e9
"""A norm that no gradient has: nothing is clipped."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Opacus warns of secure random numbers, and torch of full backward hooks on inputs without gradient."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(mark(nn.Conv2d(3, 6, 3)), nn.Tanh(), mark(nn.Conv2d(6, 4, 3, groups=2, bias=False)), nn.GroupNorm(2, 4)),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), mark(nn.Linear(8, 3), gain="linear")),
    )


def samples() -> TensorDataset:
    torch.manual_seed(1)
    return TensorDataset(torch.randn(24, 3, 8, 8), torch.randint(3, (24,)))


def private(
    net: nn.Module, optimizer: Any, mode: str, noise: float, norm: float, engine: PrivacyEngine | None = None
) -> tuple[Any, Any, Any, Any]:
    """Model, optimizer, criterion and data, in batches of eight."""
    criterion = nn.CrossEntropyLoss()
    parts = (engine or PrivacyEngine()).make_private(
        module=net,
        optimizer=optimizer,
        criterion=criterion,
        data_loader=DataLoader(samples(), 8),
        noise_multiplier=noise,
        max_grad_norm=norm,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    return parts if mode == "ghost" else (parts[0], parts[1], criterion, parts[2])


def epoch(model: nn.Module, optimizer: Any, criterion: Any, loader: Any) -> None:
    for images, labels in loader:
        optimizer.zero_grad()
        criterion(model(images), labels).backward()
        optimizer.step()


def assert_trained_plainly(net: nn.Module, epochs: int) -> None:
    plain = network()
    optimizer = pws.optim.SGD(plain, lr=0.3, momentum=0.9)
    for _ in range(epochs):
        epoch(plain, optimizer, nn.CrossEntropyLoss(), DataLoader(samples(), 8))
    for one, other in zip(net.parameters(), plain.parameters(), strict=True):
        assert_close(one, other, "trajectory float32")


@pytest.mark.parametrize("mode", MODES)
def test_without_noise_and_clipping_private_training_is_training(mode: str) -> None:
    net = network()
    parts = private(net, pws.optim.SGD(net, lr=0.3, momentum=0.9), mode, noise=0.0, norm=LARGE)
    for _ in range(3):
        epoch(*parts)
    assert_trained_plainly(net, 3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lr", [0.01, 30.0])
def test_noise_moves_no_layer_further_than_the_bound(mode: str, lr: float) -> None:
    """Opacus writes the noisy gradients inside its own `step`; the inner one bounds them."""
    net = network()
    inner = pws.optim.SGD(net, lr=lr)
    model, optimizer, criterion, loader = private(net, inner, mode, noise=1.0, norm=1.0)
    epoch(model, optimizer, criterion, loader)
    for batch in loader:
        before = positions(net, inner)
        epoch(model, optimizer, criterion, [batch])
        lengths = [float((now - before[name]).norm()) for name, now in positions(net, inner).items()]
        assert all(0 < length <= 0.3 * (1 + 1e-5) for length in lengths)
        assert lr < 1 or lengths == pytest.approx([0.3] * len(lengths), rel=1e-3)
    for name in pws.marked(net):
        assert float(net.get_submodule(name).weight.flatten(1).mean(1).abs().max()) < 1e-6


def test_batches_that_are_larger_than_memory() -> None:
    net = network()
    model, optimizer, criterion, loader = private(
        net, pws.optim.SGD(net, lr=0.3, momentum=0.9), "hooks", noise=0.0, norm=LARGE
    )
    for _ in range(2):
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as parts:
            epoch(model, optimizer, criterion, parts)
    assert_trained_plainly(net, 2)


def layer_form() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(pws.Conv2d(3, 6, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3))


@pytest.mark.parametrize("given", ["private", "inner"])
def test_clipping_before_the_private_step_is_refused(given: str) -> None:
    net = layer_form()
    inner = torch.optim.SGD(pws.param_groups(net, lr=30.0))
    model, optimizer, criterion, loader = private(net, inner, "hooks", noise=1.0, norm=1.0)
    images, labels = next(iter(loader))
    criterion(model(images), labels).backward()
    with pytest.raises(pws.PwsError, match="bound_steps"):
        pws.clip_grad(net, optimizer if given == "private" else inner)


def test_bound_steps_bounds_the_noisy_step_and_leaves_the_accountant_at_work() -> None:
    net, engine = layer_form(), PrivacyEngine()
    model, optimizer, criterion, loader = private(
        net, torch.optim.SGD(pws.param_groups(net, lr=30.0)), "hooks", noise=1.0, norm=1.0, engine=engine
    )
    pws.private.bound_steps(net, optimizer)
    for step, batch in enumerate(loader):
        assert sum(steps for *_, steps in engine.accountant.history) == step
        before = [p.detach().clone() for p in net[0].parameters()]
        epoch(model, optimizer, criterion, [batch])
        moved = [float((p - old).norm()) for p, old in zip(net[0].parameters(), before, strict=True)]
        assert sum(length**2 for length in moved) ** 0.5 == pytest.approx(0.3, rel=1e-3)


def test_bound_steps_is_told_another_optimizer() -> None:
    net = layer_form()
    with pytest.raises(pws.PwsError, match=r"got SGD\. Give what PrivacyEngine\.make_private returned"):
        pws.private.bound_steps(net, torch.optim.SGD(net.parameters(), lr=0.1))


def test_a_private_run_goes_on_from_its_state_to_the_same_bits() -> None:
    def run(epochs: int, state: dict[str, Any] | None = None) -> tuple[nn.Module, dict[str, Any]]:
        net = network()
        model, optimizer, criterion, loader = private(net, pws.optim.AdamW(net, lr=0.01), "hooks", noise=0.0, norm=1.0)
        if state is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        for _ in range(epochs):
            epoch(model, optimizer, criterion, loader)
        return net, {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    whole, _ = run(4)
    resumed, _ = run(2, run(2)[1])
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
