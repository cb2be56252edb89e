"""Numbers and memory that a kernel or a step can't take as they come: each is right, or refused."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from backends import HERE
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn import functional as F

import pws
from pws._mark import adopt, kernel_of, mark

STEPS = ["reference", *HERE]
SGD, ADAMW = pws.optim.SGD, pws.optim.AdamW


@pytest.mark.parametrize("scale", [1e-23, 1e-3, 1.0, 1e12, 1e18, 1e19, 1e25, 1e37])
@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (5, 40)])
def test_a_kernel_of_large_weights_is_that_in_float64(shape: tuple[int, ...], scale: float) -> None:
    weight = torch.randn(shape) * scale
    weight.requires_grad_()
    kernel = pws.standardize(weight, gain=1.0)
    wide = weight.detach().double().requires_grad_()
    expected = pws.standardize(wide, gain=1.0)
    assert_close(kernel, expected, "float32")
    seed = torch.randn(shape)
    kernel.backward(seed)
    expected.backward(seed.double())
    assert_close(weight.grad * scale, wide.grad * scale, "float32")


@pytest.mark.parametrize("compiled", [False, True])
def test_large_filters_beside_small_ones(compiled: bool) -> None:
    weight = torch.randn(4, 3, 3, 3) * torch.tensor([1.0, 1e20, 1e-3, 1e30])[:, None, None, None]
    form = torch.compile(pws.standardize, backend="aot_eager") if compiled else pws.standardize
    assert_close(form(weight, gain=1.0), pws.standardize(weight.double(), gain=1.0), "float32")


@pytest.mark.parametrize("way", ["eager", "compiled", "vmap"])
@pytest.mark.parametrize("scale", [1.0, 1e19, 1e30, 1e37])
@pytest.mark.parametrize("kind", [pws.Conv2d, pws.ConvTranspose2d])
def test_a_layer_of_large_weights(kind: type[nn.Module], scale: float, way: str) -> None:
    layer: Any = kind(4, 6, 3)
    with torch.no_grad():
        layer.weight[0] *= scale
        layer.weight[1:] *= torch.tensor([1.0, 1e-3]).repeat(3)[: len(layer.weight) - 1, None, None, None]
    images, wide = torch.randn(2, 4, 5, 5), deepcopy(layer).double()
    call = {
        "eager": layer,
        "compiled": torch.compile(deepcopy(layer), backend="aot_eager", fullgraph=True),
        "vmap": lambda x: torch.func.vmap(lambda one: torch.func.functional_call(layer, {"weight": one}, (x,)))(
            layer.weight[None]
        )[0],
    }[way]
    assert_close(call(images), wide(images.double()), "float32")


@pytest.mark.parametrize("fill", [0.0, 1.0, 1e-23, torch.nan, torch.inf])
def test_a_constant_filter_without_gamma_leaves_the_others(fill: float) -> None:
    weight = torch.randn(8, 3, 3, 3)
    weight[3] = fill
    kernel, others = pws.standardize(weight, gain=1.0, gamma=0.0), [i for i in range(8) if i != 3]
    flat = weight[others].double().flatten(1)
    expected = (flat - flat.mean(1, keepdim=True)) / flat.std(1, correction=0, keepdim=True) / 27**0.5
    assert_close(kernel[others].flatten(1), expected, "float32")


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e19, 1e30])
def test_a_kernel_is_adopted_whatever_its_size(scale: float) -> None:
    layer = mark(nn.Conv2d(3, 4, 3), gain=1.0)
    kernel = pws.standardize(torch.randn(4, 3, 3, 3), gain=1.0, gamma=0.0) * scale
    w, alpha = adopt(kernel, layer.pws)
    assert_close(w.square().flatten(1).mean(1), torch.full((4,), 2 / 27), "float32")
    assert_close(kernel_of(w, alpha, layer.pws) / scale, kernel / scale, "float32")


@pytest.mark.parametrize("which", ["alpha", "weight"])
def test_weight_and_alpha_are_real(which: str) -> None:
    layer = pws.Linear(3, 4)
    setattr(layer, which, nn.Parameter(getattr(layer, which).detach().to(torch.complex64)))
    for call in (layer.kernel, lambda: layer(torch.ones(2, 3)), lambda: pws.standardize(layer.weight, layer.alpha)):
        with pytest.raises(pws.PwsError, match="complex"):
            call()


@pytest.mark.parametrize("moved", ["weight", "alpha"])
def test_a_weight_and_its_alpha_are_on_one_device(moved: str) -> None:
    layer = pws.Conv2d(3, 4, 3)
    setattr(layer, moved, nn.Parameter(getattr(layer, moved).detach().to("meta")))
    for call in (layer.kernel, lambda: pws.standardize(layer.weight, layer.alpha)):
        with pytest.raises(pws.PwsError, match="must be on one device"):
            call()


def negated(weight: Tensor) -> Tensor:
    """The same numbers, of which the memory holds the opposite."""
    view = torch._neg_view(-weight.detach())
    assert view.is_neg()
    return view


def test_a_negated_view_keeps_its_sign() -> None:
    weight = torch.randn(4, 3, 3, 3)
    assert torch.equal(pws.standardize(negated(weight)), pws.standardize(weight))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    conv = mark(nn.Conv2d(3, 6, 3), gain=1.0)
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), mark(nn.Linear(6 * 36, 4), gain=1.0))


BATCH = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4


def trained(net: nn.Module, make: Any, gradient: Callable[[Tensor], Tensor] = lambda g: g) -> list[Tensor]:
    optimizer = make(net, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(BATCH[0]), BATCH[1]).backward()
        for parameter in net.parameters():
            parameter.grad = gradient(parameter.grad)
        optimizer.step()
    return [parameter.detach().resolve_neg() for parameter in net.parameters()]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("make", [SGD, ADAMW])
@pytest.mark.parametrize("what", ["weight", "gradient"])
def test_a_step_of_negated_views(step: str, make: Any, what: str) -> None:
    with pws.kernels.use(step):
        expected, net = trained(model(), make), model()
        if what == "weight":
            net[0].weight, net[3].weight = (nn.Parameter(negated(net[i].weight)) for i in (0, 3))
        found = trained(net, make, negated if what == "gradient" else lambda g: g)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, "float32")


KEYS = ("w", "alpha", "momentum_buffer", "alpha_momentum_buffer")


def stepped(step: str, key: str, change: Callable[[Tensor], Tensor]) -> tuple[nn.Module, pws.optim.SGD]:
    """After a step, with a tensor of the state changed, before the next."""
    net = model()
    optimizer = SGD(net, lr=0.1, momentum=0.9)
    F.cross_entropy(net(BATCH[0]), BATCH[1]).backward()
    with pws.kernels.use(step):
        optimizer.step()
    state = optimizer.state[net[0].weight]
    state[key] = change(state[key])
    optimizer.plans.clear()
    return net, optimizer


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("key", KEYS)
def test_a_state_on_another_device_is_refused(step: str, key: str) -> None:
    net, optimizer = stepped(step, key, lambda t: t.to("meta"))
    before = deepcopy(net.state_dict())
    with (
        pws.kernels.use(step),
        pytest.raises(pws.PwsError, match=r"moves a layer on one device; the weight '0\.weight'"),
    ):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("key", KEYS)
def test_a_state_of_negated_views_is_read_right_or_refused(step: str, key: str) -> None:
    (net, optimizer), (plain, expected) = (stepped(step, key, change) for change in (negated, torch.clone))
    with pws.kernels.use(step):
        if key == "alpha":
            with pytest.raises(pws.PwsError, match=r"as memory holds them; those of '0\.weight' are a view"):
                optimizer.step()
            return
        optimizer.step()
        expected.step()
    for one, other in zip(net.parameters(), plain.parameters(), strict=True):
        assert_close(one, other, "float32")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("make", [SGD, ADAMW])
@pytest.mark.parametrize("bound", [None, 0.03])
def test_a_constant_filter_of_the_state_without_gamma_stops_the_step(step: str, make: Any, bound: float | None) -> None:
    """Its gradient is not finite; nothing has moved then, and no filter is what memory held by chance."""
    net = nn.Sequential(mark(nn.Conv2d(3, 8, 3), gain=1.0, gamma=0.0), nn.Flatten())
    optimizer = make(net, lr=0.1, step_bound=bound)
    with pws.kernels.use(step):
        net(BATCH[0]).square().mean().backward()
        optimizer.step()
        optimizer.state[net[0].weight]["w"][3] = 1.0
        before = net[0].weight.detach().clone()
        with pytest.raises(pws.optim.NonFiniteGradientError, match="the step was not taken"):
            optimizer.step()
    assert torch.equal(net[0].weight, before)


def test_large_finite_gradients_are_not_called_infinite() -> None:
    net = model()
    optimizer = SGD(net, lr=0.1)
    (F.cross_entropy(net(BATCH[0]), BATCH[1]) * 1e25).backward()
    with pytest.raises(pws.optim.NonFiniteGradientError, match="are finite, but their squares overflow"):
        optimizer.step()
