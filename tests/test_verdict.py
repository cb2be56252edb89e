"""Verdicts: a network made to have each disease, and what is said of it."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from pws.diagnosis import CollapseWarning, Diagnosis, Monitor, Verdict, diagnose
from pws.methods import build_method
from pws.models import build_model
from pws.surgery.standardized import to_layers

Batch = tuple[Tensor, Tensor]


def digits(count: int = 1, size: int = 32) -> list[Batch]:
    raw = load_digits()
    pixels = torch.tensor(raw.images[: count * size], dtype=torch.float32)[:, None] / 8 - 0.6
    return list(zip(pixels.split(size), torch.tensor(raw.target[: count * size]).split(size), strict=True))


def net(method: str = "none", model: str = "stack4") -> nn.Module:
    """Convolutions features.0, .2, .4, .6 (without a norm) and head."""
    torch.manual_seed(1)
    built = build_model(model, build_method(method), in_channels=1, num_classes=10, width=0.1)
    to_layers(built)  # which torch's own optimizers train; test_diagnose_marked.py has the other form
    return built


def explain(model: nn.Module, **settings: Any) -> Diagnosis:
    return diagnose(model, digits()[0], F.cross_entropy, **settings)


def clean(verdict: Verdict | None) -> Verdict:
    """A verdict as a reader may see it: sentences without a number that is none or a name that is missing."""
    assert verdict is not None
    text = str(verdict)
    assert not re.search(r"\b(nan|inf|None|True|False)\b|''|\"\"|  | \.|\{", text), text
    assert text[0].isupper()
    assert text.endswith(".")
    if verdict.layer is not None:
        assert f"'{verdict.layer}'" in verdict.finding
    assert (verdict.remedy == "") == (verdict.cause == "healthy")
    return verdict


@torch.no_grad()
def scale(model: nn.Module, by: float, *names: str) -> nn.Module:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and (name in names or not names):
            module.weight.mul_(by)
    return model


def test_shift_from_the_critical_rate_on() -> None:
    found = explain(net())
    rate, layer = found.critical_lr, found.critical_layer
    assert layer is not None
    assert 0 < rate < math.inf
    below, above = (clean(explain(net(), lr=rate * factor).verdict) for factor in (0.99, 1.01))
    assert (below.cause, below.layer) == ("healthy", layer.name)
    assert (above.cause, above.layer) == ("shift", layer.name)
    assert f"critical learning rate is {rate:.3g}" in above.finding
    assert f"{layer.average_gradient_ratio * layer.fan_in:.0f} times" in above.finding
    assert f"{100 * layer.expectation_share:.0f} %" in above.finding
    assert "layers without a norm" not in above.finding
    assert "Convert this layer to PWS" in above.remedy
    assert f"well below {rate:.2g}" in above.remedy
    all_of_them = clean(explain(net(), lr=1e6).verdict)
    assert "5 of the 5 layers without a norm behind them are past" in all_of_them.finding
    assert "Convert the network to PWS" in all_of_them.remedy


@pytest.mark.parametrize(("by", "cause", "word"), [(0.1, "vanishing", "small"), (12.0, "exploding", "large")])
def test_the_gain_of_all_layers(by: float, cause: str, word: str) -> None:
    model = scale(net(model="stack8"), by)
    verdict = clean(explain(model).verdict)
    assert verdict.cause == cause
    assert f"gain is too {word}" in verdict.remedy
    assert "calibrate" in verdict.remedy
    # The remedy works: it says what to multiply with.
    factor = float(re.search(r"by about ([\d.e+-]+),", verdict.remedy).group(1))
    assert explain(scale(model, factor)).verdict.cause == "healthy"


@pytest.mark.parametrize(("by", "cause"), [(0.01, "vanishing"), (100.0, "exploding")])
@pytest.mark.parametrize("name", ["features.2", "features.4", "features.6"])
def test_the_gain_of_one_layer(name: str, by: float, cause: str) -> None:
    verdict = clean(explain(scale(net(), by, name)).verdict)
    assert (verdict.cause, verdict.layer) == (cause, name)


@pytest.mark.parametrize("by", [1e-4, 1e4])
def test_the_scale_of_the_head_is_its_own(by: float) -> None:
    assert clean(explain(scale(net(), by, "head")).verdict).cause == "healthy"


@pytest.mark.parametrize(("dead", "named"), [("features.0", "features.2"), ("features.6", "head")])
def test_dead_units(dead: str, named: str) -> None:
    model = net()
    nn.init.constant_(model.get_submodule(dead).bias, -100)
    verdict = clean(explain(model, lr=100.0).verdict)
    assert (verdict.cause, verdict.layer) == ("dead", named)
    assert "100 % of its input channels are zero" in verdict.finding
    assert "lower learning rate" in verdict.remedy


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["features.0", "features.4", "head"])
def test_a_weight_that_is_not_finite(name: str, value: float) -> None:
    model = net()
    with torch.no_grad():
        model.get_submodule(name).weight.view(-1)[-1] = value
    verdict = clean(explain(model, lr=1.0).verdict)
    assert (verdict.cause, verdict.layer) == ("non-finite weight", name)
    assert "checkpoint" in verdict.remedy


def test_finite_weights_whose_output_overflows() -> None:
    verdict = clean(explain(scale(net(), 1e25, "features.2", "features.4"), lr=1.0).verdict)
    assert (verdict.cause, verdict.layer) == ("non-finite output", "features.4")
    before = explain(scale(net(), 1e25, "features.2")).layers[2].input.variance
    assert f"input has variance {before:.3g}" in verdict.finding
    assert 1e40 < before < math.inf
    assert "PWS" in verdict.remedy


def test_an_operation_in_front_of_a_layer_that_is_not_finite() -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.log()

    model = nn.Sequential(nn.Conv2d(1, 4, 3), Log(), nn.Flatten(), nn.Linear(144, 10))
    verdict = clean(explain(model).verdict)
    assert (verdict.cause, verdict.layer) == ("non-finite input", "3")


@pytest.mark.parametrize("where", ["loss", "middle"])
def test_a_gradient_that_is_not_finite(where: str) -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 0).sqrt() + x.relu()  # zero times infinity, backward

    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), Root() if where == "middle" else nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
    )

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        found = F.cross_entropy(outputs, labels)
        return found + (outputs * 0).sqrt().sum() if where == "loss" else found

    verdict = clean(diagnose(model, digits()[0], loss, lr=1.0).verdict)
    assert (verdict.cause, verdict.layer) == ("non-finite gradient", "3" if where == "loss" else "0")
    assert "forward pass is finite" in verdict.finding


def test_a_loss_that_is_not_finite_is_not_healthy() -> None:
    verdict = diagnose(net(), digits()[0], lambda *pair: F.cross_entropy(*pair) * math.inf).verdict
    assert verdict.cause != "healthy"
    assert "loss" in str(verdict)


def test_healthy_with_and_without_a_rate() -> None:
    found = explain(net())
    without, with_rate = clean(found.verdict), clean(explain(net(), lr=0.001).verdict)
    assert without.cause == with_rate.cause == "healthy"
    assert without.finding.startswith("No layer is in danger:")
    assert "at learning rate 0.001" in with_rate.finding
    for verdict in (without, with_rate):
        assert verdict.layer == found.critical_layer.name
        assert f"{found.critical_lr:.3g} ('{verdict.layer}')" in verdict.finding


def test_a_norm_takes_the_shift_back() -> None:
    # Small weights in front of a norm have large gradients: their critical rate is tiny, and harmless.
    found = explain(scale(net("bn"), 0.01, "features.3"))
    layer = found.layers[1]
    assert layer.name == "features.3"
    assert layer.normalized
    assert layer.critical_lr < found.critical_lr / 100
    verdict = clean(
        explain(scale(net("bn"), 0.01, "features.3"), lr=(layer.critical_lr * found.critical_lr) ** 0.5).verdict
    )
    assert verdict.cause == "healthy"
    # The head has no norm behind it, and is judged.
    assert clean(explain(net("bn"), lr=1e4).verdict).layer == "head"
    # Without the norm the same weights are in danger.
    plain = explain(scale(net(), 0.1, "features.2"), lr=1e4)
    assert clean(plain.verdict).cause == "shift"


@pytest.mark.parametrize("lr", [None, 0.1, 1e6])
def test_no_step_shifts_a_pws_net(lr: float | None) -> None:
    found = explain(net("pws"), lr=lr)
    assert found.critical_lr == math.inf
    verdict = clean(found.verdict)
    assert (verdict.cause, verdict.layer) == ("healthy", None)
    assert "keeps its mean" in verdict.finding


def test_a_model_that_is_a_layer_is_named() -> None:
    torch.manual_seed(0)
    verdict = clean(diagnose(nn.Linear(4, 3), torch.randn(8, 4), lambda out: out.square().mean(), lr=1e3).verdict)
    assert (verdict.cause, verdict.layer) == ("shift", "Linear")


# --- Of a collapse in training ---


def collapse(
    model: nn.Module,
    steps: int,
    lr: float,
    *,
    momentum: float = 0.9,
    before: Callable[[int], None] = lambda _: None,
    every: int = 4,
) -> Monitor:
    sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    with warnings.catch_warnings(), Monitor(model, every, lr=lr or None, momentum=momentum) as monitor:
        warnings.simplefilter("ignore", CollapseWarning)
        for number, (images, labels) in enumerate(digits(steps)):
            before(number)
            loss = monitor.observe(F.cross_entropy(model(images), labels))
            sgd.zero_grad()
            loss.backward()
            sgd.step()
    return monitor


@pytest.mark.parametrize(("model", "method"), [("stack8", "none"), ("stack16", "none"), ("stack8", "wn")])
def test_a_plain_net_at_learning_rate_1(model: str, method: str) -> None:
    monitor = collapse(net(method, model), 40, 1.0)
    assert monitor.first_unhealthy is not None
    verdict = clean(monitor.verdict)
    assert verdict.cause == "shift"
    step = int(re.search(r"At step (\d+) their means", verdict.finding).group(1))
    told = {d.step: {layer.name: layer for layer in d.layers} for d in monitor.history}
    now, then = told[step][verdict.layer], told[0][verdict.layer]
    assert now.shift_share > then.shift_share + 0.3
    assert (
        f"made {100 * now.shift_share:.0f} % of its variance ({100 * then.shift_share:.0f} % at the start)"
        in verdict.finding
    )
    assert f"from {then.output.variance:.2g} to {now.output.variance:.2g}" in verdict.finding
    assert "training ran at 1." in verdict.finding
    assert "PWS" in verdict.remedy
    below = re.search(r"below ([\d.e+-]+)\.$", verdict.remedy)
    assert below is None or float(below.group(1)) < 1


@pytest.mark.parametrize("method", ["bn", "pws"])
def test_a_run_that_trains_is_healthy(method: str) -> None:
    monitor = collapse(net(method), 12, 0.05)
    assert monitor.first_unhealthy is None
    assert clean(monitor.verdict).cause == "healthy"


def jump(model: nn.Module, name: str, by: float, at: int = 5) -> Callable[[int], None]:
    """Multiplies the weights; infinity stands for the largest that are finite."""

    def before(number: int) -> None:
        if number == at and by == math.inf:
            with torch.no_grad():
                model.get_submodule(name).weight.sign_().mul_(3e38)
        elif number == at:
            scale(model, by, name)

    return before


@pytest.mark.parametrize(
    ("name", "by", "cause"),
    [
        *[(name, 1e-2, "vanishing") for name in ("features.2", "features.6", "head")],
        *[(name, math.inf, "exploding") for name in ("features.2", "features.6")],
    ],
)
def test_a_scale_that_jumps_is_no_shift(name: str, by: float, cause: str) -> None:
    model = net()
    monitor = collapse(model, 9, 0.0, before=jump(model, name, by))
    verdict = clean(monitor.verdict)
    assert (verdict.cause, verdict.layer) == (cause, name)
    # A jump that overflows is seen in its own step, one that does not at the next measurement.
    assert monitor.first_unhealthy.step == (8 if cause == "vanishing" else 5)
    assert f"at step {monitor.first_unhealthy.step}" in verdict.finding
    assert "at step 4," in verdict.finding
    assert "lower the learning rate" in verdict.remedy


def test_weights_that_an_update_broke() -> None:
    model = net()
    monitor = collapse(model, 9, 0.0, before=jump(model, "features.4", math.nan))
    verdict = clean(monitor.verdict)
    assert (verdict.cause, verdict.layer) == ("non-finite weight", "features.4")


def test_a_layer_that_started_at_zero_and_overflowed() -> None:
    model = net()
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)

    def before(number: int) -> None:
        if number == 5:
            nn.init.constant_(model.head.weight, 3e38)

    verdict = clean(collapse(model, 9, 0.0, before=before).verdict)
    assert verdict.layer == "head"
    assert verdict.cause in ("exploding", "non-finite output", "shift")


def test_an_overflow_in_the_first_step() -> None:
    model = scale(net(), 1e25, "features.2", "features.4")
    monitor = collapse(model, 2, 0.1)
    assert len(monitor.history) == 1
    assert monitor.last_healthy is None
    assert (clean(monitor.verdict).cause, monitor.verdict.layer) == ("non-finite output", "features.4")


@pytest.mark.parametrize("lr", [1e3, 1e10, 1e30])
@pytest.mark.parametrize("method", ["none", "bn", "gn", "wn", "pws"])
def test_no_sentence_holds_a_number_that_is_none(method: str, lr: float) -> None:
    monitor = collapse(net(method), 6, lr, every=1)
    for diagnosis in monitor.history:
        clean(diagnosis.verdict)
    clean(monitor.verdict)
    if monitor.first_unhealthy is not None:
        assert monitor.verdict.cause != "healthy"
