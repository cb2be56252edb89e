"""Autocast keeps half-precision copies of weights: nothing that writes to weights, or runs without gradient, may meet one."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pws
from pws._mark import mark
from pws.optim.base import StandardizingOptimizer

autocast = partial(torch.autocast, "cpu", torch.bfloat16)
BATCHES = [(torch.randn(16, 1, 8, 8), torch.arange(16) % 4) for _ in range(2)]
IMAGES = BATCHES[0][0]


def net(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(3)
    norms = [nn.BatchNorm2d(8) if norm else nn.Identity() for _ in range(2)]
    convs = [nn.Conv2d(1, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(convs[0], norms[0], convs[1], convs[2], norms[1], convs[3], nn.Flatten(), nn.Linear(128, 4))


def marked() -> nn.Sequential:
    model = net()
    for layer in (model[0], model[3]):
        mark(layer)
    return model


def test_a_forecast_is_that_of_autocast_without_a_cache() -> None:
    plain = pws.forecast(net(), BATCHES, F.cross_entropy).diverging_lr
    with autocast(cache_enabled=False):
        expected = pws.forecast(net(), BATCHES, F.cross_entropy).diverging_lr
    with autocast():
        found = pws.forecast(net(), BATCHES, F.cross_entropy).diverging_lr
    assert found == expected
    assert found == pytest.approx(plain, rel=0.5)


class Twice(nn.Module):
    """A layer of it runs twice in a pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.twice = mark(nn.Conv2d(1, 8, 3)), mark(nn.Conv2d(8, 8, 3, padding=1))
        self.head = nn.Linear(288, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.twice(F.relu(self.twice(F.relu(self.first(x))))))
        logits: Tensor = self.head(x.flatten(1))
        return logits


class Decorated(Twice):
    """Its own autocast has a cache, whatever stands around it."""

    @torch.autocast("cpu", torch.bfloat16)
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_a_forecast_of_a_model_with_autocast_of_its_own() -> None:
    with autocast(cache_enabled=False):
        expected = pws.forecast(Twice(), BATCHES, F.cross_entropy).diverging_lr
    with autocast():
        found = pws.forecast(Decorated(), BATCHES, F.cross_entropy).diverging_lr
    assert found == pytest.approx(expected, rel=0.2)  # gradients of the two runs are added in half precision


def test_calibrate_of_a_model_with_autocast_of_its_own() -> None:
    (expected, found), outputs = (Twice(), Decorated()), []

    def keep(_: nn.Module, __: object, output: Tensor) -> None:
        outputs.append(output.clone())

    for model in (expected, found):
        model.head.register_forward_hook(keep)
    with autocast(cache_enabled=False):
        pws.calibrate(expected, IMAGES)
    with autocast():
        found(IMAGES)  # which fills the cache
        outputs.pop()
        pws.calibrate(found, IMAGES)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))
    assert torch.equal(*outputs)  # the second run of a layer is that of its new weight


def step_of(make: Callable[[nn.Module], StandardizingOptimizer]) -> Callable[[nn.Module], None]:
    def step(model: nn.Module) -> None:
        optimizer = make(model)
        F.cross_entropy(model(IMAGES), BATCHES[0][1]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


WRITERS: dict[str, Callable[[nn.Module], object]] = {
    "calibrate": lambda model: pws.calibrate(model, IMAGES, target=9.0, mean=0.0),
    "mark": lambda model: mark(model[3], reset_parameters=True),
    "optim.SGD": step_of(lambda model: pws.optim.SGD(model, lr=0.5)),
    "optim.AdamW": step_of(lambda model: pws.optim.AdamW(model, lr=0.5)),
    "optim.Wrapped": step_of(lambda model: pws.optim.Wrapped(model, torch.optim.RMSprop, lr=0.5)),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_the_next_pass_computes_with_what_was_written(writer: str) -> None:
    model = marked()
    with autocast():
        before = model(IMAGES)  # which fills the cache
        WRITERS[writer](model)
        found = model(IMAGES)
    with autocast():
        assert torch.equal(found, model(IMAGES))
    assert not torch.equal(found, before)


def run_only(model: nn.Module) -> Tensor:
    with pws.Monitor(model, every=1000) as monitor:
        for _ in range(3):
            model(IMAGES)
        with pytest.warns(pws.CollapseWarning):
            model(IMAGES * torch.inf)  # step 3 is not measured: looked at again
    assert monitor.first_unhealthy is not None
    return IMAGES


RUNNERS: dict[str, Callable[[nn.Module], object]] = {
    "diagnose": lambda model: torch.no_grad()(pws.diagnose)(model, BATCHES[0], F.cross_entropy),
    "forecast": lambda model: torch.no_grad()(pws.forecast)(model, BATCHES, F.cross_entropy),
    "plan": lambda model: pws.plan(model, IMAGES),
    "convert": lambda model: pws.convert(model, IMAGES),
    "warm start": lambda model: pws.convert(model, IMAGES, warm_start=True),
    "Monitor": run_only,
}


@pytest.mark.parametrize("runner", RUNNERS)
def test_the_next_pass_has_its_gradients(runner: str) -> None:
    model = net(norm=True)
    with autocast():
        RUNNERS[runner](model)
        model(IMAGES).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_converted_model_trains_in_the_region_that_made_it() -> None:
    model = net(norm=True)
    model.eval()
    with autocast():
        converted = pws.convert(model, IMAGES, warm_start=True)
        converted(IMAGES).sum().backward()
    assert all(parameter.grad is not None for parameter in converted.parameters())


@pytest.mark.parametrize("settings", [{"mean": 0.0}, {"per_channel": True}], ids=str)
def test_calibrate_is_that_of_autocast_without_a_cache(settings: dict[str, object]) -> None:
    cached, uncached = marked(), marked()
    with autocast():
        cached(IMAGES)
        pws.calibrate(cached, IMAGES, **settings)
    with autocast(cache_enabled=False):
        pws.calibrate(uncached, IMAGES, **settings)
    assert all(torch.equal(a, b) for a, b in zip(cached.parameters(), uncached.parameters(), strict=True))


def test_the_cache_is_as_it_was() -> None:
    for enabled in (True, False):
        with autocast(cache_enabled=enabled):
            pws.calibrate(deepcopy(marked()), IMAGES)
            assert torch.is_autocast_cache_enabled() is enabled
