"""What `pws.diagnose` refuses, and what it makes of NaN and infinity."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from diagnose_helpers import (
    TwoInputs,
    X,
    cross_entropy,
    deterministic,
    hooks,
    images,
    rendered,
    square,
    state,
)
from torch import Tensor, nn
from torch.nn import functional as F

from pws._errors import PwsError
from pws.diagnosis import diagnose

# --- Bad input ---


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2))


class NoGrad(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(3, 2), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "detach":
            return self.layer(x).detach()
        with torch.no_grad() if self.how == "no_grad" else torch.inference_mode():
            return self.layer(x)


class Asserts(nn.Module):
    """As timm's vision transformers check the size of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 3, f"Input height ({x.shape[1]}) doesn't match model (3)."
        y: Tensor = self.layer(x)
        return y


def bad_input(value: float) -> Tensor:
    x = torch.randn(8, 3)
    x[2, 1] = value
    return x


BAD: dict[str, tuple[Callable[[], nn.Module], Any, Callable[..., Any], dict[str, Any], str]] = {
    "no layers": (
        lambda: nn.Sequential(nn.ReLU(), nn.Flatten()),
        X,
        square,
        {},
        r"layer with a weight.*holds Flatten, ReLU",
    ),
    "an empty model": (nn.Sequential, X, square, {}, "layer with a weight.*holds nothing|holds Sequential"),
    "norms alone": (lambda: nn.BatchNorm1d(3), X, square, {}, r"layer with a weight.*BatchNorm1d"),
    "a wrong shape": (linear, torch.ones(8, 4), square, {}, "rejects the batch: RuntimeError.*shapes"),
    "a wrong dtype": (
        linear,
        torch.ones(8, 3, dtype=torch.int64),
        square,
        {},
        "rejects the batch: RuntimeError.*dtype",
    ),
    "a shape the model asserts": (
        Asserts,
        torch.ones(8, 4),
        square,
        {},
        "rejects the batch: AssertionError: Input height",
    ),
    "too many inputs": (linear, ((X, X), X), F.mse_loss, {}, "rejects the batch: TypeError"),
    "unknown names": (linear, ({"image": X}, X), F.mse_loss, {}, "rejects the batch: TypeError.*image"),
    "an array": (linear, np.ones((8, 3)), square, {}, r"a batch is \(inputs, targets\).*got ndarray"),
    "an array in a pair": (linear, (np.ones((8, 3)), X), F.mse_loss, {}, "ndarray"),
    "a string": (linear, "batch", square, {}, r"a batch is .*got str"),
    "none": (linear, None, square, {}, r"a batch is .*got NoneType"),
    "a triple": (linear, (X, X, X), square, {}, r"a batch is .*tuple of 3.*\(\(image, mask\), target\)"),
    "nothing": (linear, (), square, {}, r"a batch is .*tuple of 0"),
    "a loss with shape": (linear, X, lambda out: out, {}, r"scalar.*\(8, 2\).*mean"),
    "a loss that is a number": (linear, X, lambda out: float(out.mean()), {}, "scalar tensor; got a float"),
    "no loss": (linear, X, lambda out: None, {}, "scalar tensor; got a NoneType"),
    "a loss of the input": (linear, X, lambda out: X.sum(), {}, "must depend on the model's parameters"),
    "a loss of something else": (
        *(linear, X, lambda out: torch.ones((), requires_grad=True) * 2, {}),
        "must depend on the model's parameters.*none of them",
    ),
    "detached": (lambda: NoGrad("detach"), X, square, {}, "must depend on the model's parameters.*detaches"),
    "no_grad": (lambda: NoGrad("no_grad"), X, square, {}, "must depend on the model's parameters.*no_grad"),
    "inference_mode": (lambda: NoGrad("inference"), X, square, {}, "must depend on the model's parameters"),
    "frozen": (lambda: linear().requires_grad_(False), X, square, {}, "must depend on the model's parameters.*frozen"),
    "nan": (linear, bad_input(math.nan), square, {}, r"input must be finite; got 1 .*of 24 .*\(8, 3\)"),
    "infinity": (linear, (bad_input(math.inf), X), square, {}, "input must be finite"),
    "nan in a dict": (
        TwoInputs,
        {"image": bad_input(math.nan), "mask": torch.ones(8, 4)},
        square,
        {},
        "input must be finite",
    ),
    "targets missing": (linear, X, cross_entropy, {}, r"loss\(outputs\).*no targets.*TypeError.*target"),
    "wrong targets": (
        linear,
        (X, torch.ones(3)),
        cross_entropy,
        {},
        r"loss\(outputs, targets\).*\(8, 2\).*targets.*\(3,\)",
    ),
    "targets out of range": (
        linear,
        (X, torch.full((8,), 7)),
        cross_entropy,
        {},
        r"loss\(outputs, targets\).*IndexError",
    ),
    "lr 0": (linear, X, square, {"lr": 0.0}, "lr must be positive and finite; got 0.0"),
    "lr negative": (linear, X, square, {"lr": -0.1}, "lr must be positive"),
    "lr nan": (linear, X, square, {"lr": math.nan}, "lr must be positive and finite; got nan"),
    "lr infinite": (linear, X, square, {"lr": math.inf}, "lr must be positive and finite"),
    "momentum 1": (linear, X, square, {"lr": 0.1, "momentum": 1.0}, "momentum .*below 1; got 1.0"),
    "momentum negative": (linear, X, square, {"momentum": -0.1}, "momentum must be at least 0"),
    "momentum nan": (linear, X, square, {"momentum": math.nan}, "momentum .*got nan"),
    "steps 0": (linear, X, square, {"steps": 0}, "steps must be a whole number, at least 1; got 0"),
    "steps of a half": (linear, X, square, {"lr": 0.1, "steps": 1.5}, "steps must be .*1.5"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(2)), X, square, {}, "must be initialized; '0.weight'.*lazy"),
    "meta": (lambda: linear().to("meta"), X, square, {}, "rejects the batch|meta"),
    "an empty batch": (linear, torch.ones(0, 3), square, {}, "empty|no entries|at least one"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(case: str) -> None:
    build, batch, loss, arguments, message = BAD[case]
    model = build()
    before = None if case in ("lazy", "meta") else state(model)
    with pytest.raises(PwsError, match=message) as caught:
        diagnose(model, batch, loss, **arguments)
    text = str(caught.value)
    assert "\n" not in text
    assert text.rstrip().endswith((".", "?", ")"))
    assert before is None or state(model) == before


def test_a_lazy_model_that_has_run_is_diagnosed() -> None:
    model = nn.Sequential(nn.LazyLinear(2))
    model(X)
    assert len(diagnose(model, X, square).layers) == 1


# --- What is not finite ---


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 4, 7])
def test_weights_that_are_not_finite(where: int, value: float) -> None:
    model = deterministic()
    with torch.no_grad():
        model[where].weight.view(-1)[0] = value
    before = hooks(model)
    diagnosis = diagnose(model, images(), cross_entropy, lr=0.1, momentum=0.9, steps=10)
    assert [layer.name for layer in diagnosis.layers] == ["0", "4", "7"]
    first = [layer.name for layer in diagnosis.layers].index(str(where))
    assert [layer.finite for layer in diagnosis.layers] == [i < first for i in range(3)]
    assert [layer.finite_kernel for layer in diagnosis.layers] == [i != first for i in range(3)]
    json.dumps(diagnosis.to_dict(filters=True), allow_nan=False)
    assert rendered(diagnosis)
    assert repr(diagnosis)
    assert (diagnosis.verdict.cause, diagnosis.verdict.layer) == ("non-finite weight", str(where))
    assert hooks(model) == before


def test_a_backward_pass_that_is_not_finite() -> None:
    """A finite loss with an infinite gradient: the root at 0."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.zero_()
    diagnosis = diagnose(model, torch.randn(8, 3), lambda out: out.abs().sqrt().sum(), lr=0.1)
    assert diagnosis.loss == 0
    assert all(layer.finite for layer in diagnosis.layers)
    for layer in diagnosis.layers:  # unknown, which is neither infinite (no step shifts a filter) nor 0
        assert not layer.gradient.second_moment < math.inf
        assert layer.critical_lr is None or math.isnan(layer.critical_lr)
        assert layer.predicted_shift_share(0.1) is None or math.isnan(layer.predicted_shift_share(0.1))
    json.dumps(diagnosis.to_dict(filters=True), allow_nan=False)
    assert rendered(diagnosis)
    assert str(diagnosis.verdict)


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e20, 1e25])
def test_signals_whose_squares_leave_float32(scale: float) -> None:
    """A vanishing or exploding network, as finite as its float64 twin: squares of finite numbers may not overflow."""
    model, x = nn.Linear(8, 4), torch.randn(16, 8)
    with torch.no_grad():
        model.weight *= scale
        model.bias *= scale

    def loss(outputs: Tensor) -> Tensor:
        return (outputs * scale**-1).square().mean() * scale**-1

    found = diagnose(model, x, lambda out: (out / scale).square().mean()).layers[0]
    wide = diagnose(deepcopy(model).double(), x.double(), lambda out: (out / scale).square().mean()).layers[0]
    assert found.finite
    assert found.finite_kernel
    for field in ("transmission", "centred", "shift", "covariance", "average_gradient", "update_ratio", "critical_lr"):
        value, expected = getattr(found, field), getattr(wide, field)
        assert value == pytest.approx(expected, rel=1e-4), field
    assert found.gradient.second_moment == pytest.approx(wide.gradient.second_moment, rel=1e-4)


@pytest.mark.parametrize("where", [1, 2, 3])
def test_a_layer_whose_output_is_constant(where: int) -> None:
    """A zero-initialized layer, as the last one of a residual branch: there is a verdict, and no division by zero."""
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)))
    with torch.no_grad():
        model[where].weight.zero_()
        model[4].weight *= 1e4
    diagnosis = diagnose(model, torch.randn(8, 6), square, lr=0.1, momentum=0.9, steps=3)
    assert diagnosis.layers[where].output.variance == 0
    assert diagnosis.layers[where].transmission == 0
    json.dumps(diagnosis.to_dict(), allow_nan=False)
    assert rendered(diagnosis)
    assert str(diagnosis.verdict)


def test_a_constant_gradient_has_no_negative_variance() -> None:
    """The same delta at every position: its variance is 0, in float32 too."""
    torch.manual_seed(0)
    for samples in (1, 3, 7, 100):
        model = nn.Conv2d(2, 3, 3)
        (layer,) = diagnose(model, torch.randn(samples, 2, 9, 9), lambda out: 0.1 * out.mean()).layers
        assert 0 <= layer.gradient.variance <= 1e-12 * layer.gradient.second_moment
        assert layer.gradient.total_variance >= 0
