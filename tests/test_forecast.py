"""`pws.forecast`: what it leaves alone, what it tells apart, what it refuses, and the search behind it."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from itertools import count
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from pws import forecast
from pws._errors import PwsError
from pws.diagnosis.divergence_probe import PRECISION, crossing
from pws.methods import build_method
from pws.models import build_model

Batch = tuple[Tensor, Tensor]


def digits(batches: int = 2, side: int = 8) -> list[Batch]:
    raw = load_digits()
    pixels = torch.tensor(raw.images[: batches * 32], dtype=torch.float32)[:, None] / 8 - 0.6
    pixels = F.interpolate(pixels, (side, side), mode="bilinear")
    return list(zip(pixels.split(32), torch.tensor(raw.target[: batches * 32]).split(32), strict=True))


def net(method: str = "none", model: str = "stack4") -> nn.Module:
    torch.manual_seed(1)
    return build_model(model, build_method(method), in_channels=1, num_classes=10, width=0.06)


def noisy() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(144, 10)),
    )


def test_the_model_is_left_as_it_was() -> None:
    model, batches = noisy(), digits()
    F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    model[1].eval()

    def state() -> dict[str, Any]:
        return {
            "weights": [(id(p), p._version, p.tolist()) for p in model.parameters()],
            "gradients": [(id(p.grad), p.grad.tolist()) for p in model.parameters()],
            "buffers": [(id(b), b.tolist()) for b in model.buffers()],
            "modes": [module.training for module in model.modules()],
            "hooks": [len(module._forward_hooks) for module in model.modules()],
            "random": torch.get_rng_state().tolist(),
            "batches": [(images.tolist(), images.requires_grad) for images, _ in batches],
        }

    before = state()
    assert 0 < forecast(model, batches, F.cross_entropy).diverging_lr < math.inf
    assert state() == before
    with pytest.raises(ZeroDivisionError):
        forecast(model, batches, lambda *_: 1 / 0)
    assert state() == before


@pytest.mark.parametrize("build", [net, noisy], ids=["plain", "dropout"])
def test_two_forecasts_are_the_same(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build()
    first, second = (forecast(model, digits(), F.cross_entropy) for _ in range(2))
    assert first == second
    assert 0 < first.diverging_lr < math.inf
    assert first.passes > 13 + 3 * 2


def test_evaluation_mode_and_no_grad_change_nothing() -> None:
    model = net("bn")
    expected = forecast(model, digits(), F.cross_entropy)
    with torch.no_grad():
        assert forecast(nn.DataParallel(model.eval()), digits(), F.cross_entropy) == expected
        assert not torch.is_grad_enabled()


def test_nets_whose_rates_are_far_apart() -> None:
    batches = digits(40, side=12)
    rates = {m: forecast(net(m, "allconv"), batches[:2], F.cross_entropy).diverging_lr for m in ("none", "bn")}
    assert rates["bn"] > 3 * rates["none"]
    # And so it is: between the two rates one of them learns.
    between, last = (rates["bn"] * rates["none"]) ** 0.5, {}
    for method in rates:
        model = net(method, "allconv")
        sgd = torch.optim.SGD(model.parameters(), lr=between, momentum=0.9)
        losses = []
        for images, labels in batches:
            loss = F.cross_entropy(model(images), labels)
            losses.append(float(loss.detach()))
            sgd.zero_grad()
            loss.backward()
            sgd.step()
        last[method] = sum(losses[-8:]) / 8
    assert last["bn"] < 1.5
    assert not last["none"] < 2.1


def test_the_rate_goes_with_the_scale_of_the_loss() -> None:
    # Adam's warm-up does not see the scale; a gradient four times as large needs a quarter of the rate.
    one, four = (
        forecast(net(), digits(), lambda *pair, by=by: by * F.cross_entropy(*pair)).diverging_lr for by in (1, 4)
    )
    assert four == pytest.approx(one / 4, rel=PRECISION - 1)


def test_pairs_of_batches_give_their_median() -> None:
    batches, model, done = digits(6), net(), []
    alone = [forecast(model, batches[i : i + 2], F.cross_entropy) for i in (0, 2, 4)]
    together = forecast(model, batches, F.cross_entropy, progress=done.append)
    assert len({one.diverging_lr for one in alone}) > 1
    assert together.diverging_lr == sorted(one.diverging_lr for one in alone)[1]
    assert together.passes == sum(one.passes for one in alone)
    assert done == sorted(done)
    assert 0 < done[-1] <= together.passes
    with pytest.raises(PwsError, match="got 3"):
        forecast(model, batches[:3], F.cross_entropy)


# --- The search ---


def guarded(f: Callable[[float], float]) -> tuple[Callable[[float], float], list[float]]:
    """`f` that fails instead of being asked for ever, and where it was asked."""
    asked: list[float] = []

    def g(x: float) -> float:
        asked.append(x)
        assert len(asked) < 200, f"no end to it: {asked[-3:]}"
        return f(x)

    return g, asked


@pytest.mark.parametrize("power", [0.5, 1, 9])
@pytest.mark.parametrize("at", [1e-6, 3e-4, 0.02, 0.1, 0.11, 7.0, 5000.0])
def test_crossing_of_a_power(at: float, power: float) -> None:
    f, asked = guarded(lambda x: (x / at) ** power)
    found = crossing(f)
    assert at / PRECISION**0.51 < found < at * PRECISION**0.51
    assert len(asked) < 30


@pytest.mark.parametrize("at", [1e-3, 0.5, 20.0])
def test_crossing_of_a_step_to_infinity(at: float) -> None:
    f, _ = guarded(lambda x: math.inf if x >= at else 0.0)
    assert crossing(f) == pytest.approx(at, rel=PRECISION - 1)


@pytest.mark.parametrize(
    ("at", "ceiling", "found"),
    [
        (2.0, 1.0, False),
        (2.0, 1.99, False),
        (2.0, 2.01, True),
        (2.0, 1e3, True),
        (0.003, 0.5, True),
        (3.0, 1e-3, False),
    ],
)
def test_a_ceiling(at: float, ceiling: float, found: bool) -> None:
    f, asked = guarded(lambda x: x / at)
    result = crossing(f, ceiling)
    assert result == (pytest.approx(at, rel=PRECISION - 1) if found else math.inf)
    assert max(asked) <= ceiling


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (lambda x: x / 1e6, math.inf),
        (lambda x: 0.0, math.inf),
        (lambda x: x / 1e-9, 0.0),
        (lambda x: math.inf, 0.0),
    ],
    ids=["above 1e4", "never", "below 1e-7", "always"],
)
def test_a_crossing_out_of_range(f: Callable[[float], float], expected: float) -> None:
    assert crossing(guarded(f)[0]) == expected


@pytest.mark.parametrize("f", [lambda x: x / 1e-9, lambda x: x, lambda x: math.inf])
def test_a_ceiling_of_zero_is_the_end(f: Callable[[float], float]) -> None:
    """What a first probe leaves that crossed below the range."""
    assert crossing(guarded(f)[0], 0.0) in (0.0, math.inf)


# --- Bad input ---


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.net(images)
        return out.detach()


@pytest.mark.parametrize("given", ["one", "none", "a pair that is no list", "NaN"])
def test_batches_that_can_not_be(given: str) -> None:
    batches = digits()
    wrong: dict[str, tuple[Any, str]] = {
        "one": (batches[:1], "needs two training batches"),
        "none": ([], "needs two training batches"),
        "a pair that is no list": (iter(batches), "needs two training batches"),
        "NaN": ([batches[0], (batches[1][0] * math.nan, batches[1][1])], "must be finite; got 2,048 NaN"),
    }
    with pytest.raises(PwsError, match=wrong[given][1]):
        forecast(net(), wrong[given][0], F.cross_entropy)


@pytest.mark.parametrize("how", ["frozen", "detached", "no parameters", "the loss ignores it"])
def test_a_model_that_gets_no_gradient(how: str) -> None:
    model: nn.Module = {"detached": Detached(), "no parameters": nn.Flatten()}.get(how, net())
    if how == "frozen":
        model.requires_grad_(False)

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return torch.zeros((), requires_grad=True) if how == "the loss ignores it" else F.cross_entropy(outputs, labels)

    with pytest.raises(PwsError, match="gradient"):
        forecast(model, digits(), loss)


def test_frozen_parameters_and_outputs_in_a_dict() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = net(), count()

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"counted": torch.zeros(3), "logits": self.net(images)}

    model = Named()
    model.net.features[0].requires_grad_(False)
    plain = deepcopy(model.net)
    found = forecast(model, digits(), lambda out, labels: F.cross_entropy(out["logits"], labels))
    assert found == forecast(plain, digits(), F.cross_entropy)
