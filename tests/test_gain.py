"""Gains against closed forms and against Gauss-Legendre quadrature, and what they are for: constant variance."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from reference import RELU_GAIN
from scipy.integrate import fixed_quad
from tolerances import assert_close
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import pws
from pws import _gain as gain
from pws._gain import ACTIVATIONS

KINKS = (-12.0, -6.0, -3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 6.0, 12.0)


def density(u: float) -> float:
    return math.exp(-u * u / 2) / math.sqrt(2 * math.pi)


def leaky(slope: float) -> float:
    return (1 + slope**2) / 2 - (1 - slope) ** 2 / (2 * math.pi)


def inside(bound: float) -> float:
    """`E[u^2; |u| < bound]`."""
    return math.erf(bound / 2**0.5) - 2 * bound * density(bound)


CLOSED_FORMS = {
    "relu": leaky(0),
    "leaky_relu": leaky(0.01),
    "rrelu": leaky((1 / 8 + 1 / 3) / 2),
    "hardtanh": inside(1) + math.erfc(1 / 2**0.5),
    "hardshrink": 1 - inside(0.5),
    "linear": 1.0,
}


def test_relu() -> None:
    assert pws.variance_preserving_gain("relu") == pytest.approx(1.71285855045, abs=1e-9)
    assert_close(pws.variance_preserving_gain("relu"), RELU_GAIN, "quadrature")


@pytest.mark.parametrize("activation", CLOSED_FORMS)
def test_closed_forms(activation: str) -> None:
    assert_close(pws.variance_preserving_gain(activation), CLOSED_FORMS[activation] ** -0.5, "quadrature")


def expectation(activation: str, power: int, centre: float = 0.0) -> float:
    """`E[(phi(u) - centre)^power]`, piece by smooth piece; the nodes are inside, so jumps at the ends do no harm."""

    def integrand(u: object) -> object:
        u = torch.as_tensor(u, dtype=torch.float64)
        values = (getattr(F, activation)(u) - centre) ** power * torch.exp(-u * u / 2) / math.sqrt(2 * math.pi)
        return values.numpy()

    return math.fsum(float(fixed_quad(integrand, *ends, n=80)[0]) for ends in pairwise(KINKS))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_by_another_quadrature(activation: str) -> None:
    variance = expectation(activation, 2, expectation(activation, 1))
    assert_close(pws.variance_preserving_gain(activation), variance**-0.5, "quadrature")


def test_activations_are_all_elementwise_ones_of_torch() -> None:
    """A name missing from the tuple would be missing from the tests above too."""
    modules = {name.lower() for name in torch.nn.modules.activation.__all__}
    take_more = {"threshold", "glu", "multiheadattention", "softmin", "softmax", "softmax2d", "logsoftmax", "prelu"}
    assert {name.replace("_", "") for name in ACTIVATIONS} == modules - take_more


def transmission(number: float, activation: str, depth: int = 8) -> float:
    """The mean factor on the variance a layer, `depth` standardized layers behind `activation` each."""
    signal = torch.randn(512, 512)
    for _ in range(depth):
        kernel = pws.standardize(torch.randn(512, 512) + 0.5, gain=number, gamma=0.0)
        signal = F.linear(getattr(F, activation)(signal), kernel)
    return float(signal.var()) ** (1 / depth)


@pytest.mark.parametrize("activation", ["relu", "tanh", "silu", "hardswish", "leaky_relu"])
def test_a_wide_network_keeps_its_variance(activation: str) -> None:
    assert_close(transmission(pws.variance_preserving_gain(activation), activation), 1.0, "transmission")


def test_the_paper_gain_transmits_what_section_3_says() -> None:
    assert_close(pws.PAPER_GAIN, math.sqrt(2), "exact")
    assert_close(transmission(pws.PAPER_GAIN, "relu"), 1 - 1 / math.pi, "transmission")


@pytest.mark.parametrize("name", ["ReLU", "relux", "", "softmax"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(pws.PwsError, match="unknown activation") as caught:
        pws.variance_preserving_gain(name)
    assert repr(name) in str(caught.value)
    assert "relu" in str(caught.value)


@pytest.fixture
def _first_use() -> None:
    """As in a process that has asked for no gain yet."""
    for function in vars(gain).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@pytest.mark.usefixtures("_first_use")
@pytest.mark.parametrize(
    "state",
    [torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)],
    ids=["meta device", "inference mode", "autocast"],
)
def test_a_gain_does_not_depend_on_the_state_of_torch(state: Any) -> None:
    """The first call for a name may come while a model is built on another device or in another precision."""
    with state:
        number = pws.variance_preserving_gain("relu")
    assert_close(number, RELU_GAIN, "quadrature")


@pytest.mark.usefixtures("_first_use")
def test_a_layer_builds_under_fake_tensors() -> None:
    """Memory planners build models so; the first gain of the process is then asked for under fake tensors."""
    with FakeTensorMode():
        assert pws.Linear(4, 3).weight.shape == (3, 4)
