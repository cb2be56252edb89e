"""The samplers of `pws.private`: gradients and norms of each sample, held to autograd on one sample after the other."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest
import torch
from opacus import GradSampleModule, PrivacyEngine
from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
from tolerances import assert_close
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pws
import pws.private
from pws.private import _register, kernel_gradient, norm_sampler

Sampler = Callable[..., dict[Tensor, Tensor]]
Cases = dict[str, tuple[str, dict[str, Any], tuple[int, ...]]]
CONVOLUTIONS: Final[Cases] = {
    "1d same, dilated": ("Conv1d", {"args": (4, 6, 4), "padding": "same", "dilation": 2}, (4, 9)),
    "2d strided, groups": ("Conv2d", {"args": (4, 6, 3), "stride": 2, "padding": (1, 2), "groups": 2}, (4, 7, 8)),
    "2d depthwise": ("Conv2d", {"args": (4, 8, 3), "groups": 4, "bias": False}, (4, 5, 5)),
    "2d circular": ("Conv2d", {"args": (3, 5, (2, 3)), "padding": (1, 2), "padding_mode": "circular"}, (3, 6, 5)),
    "2d reflect, same": ("Conv2d", {"args": (3, 5, 4), "padding": "same", "padding_mode": "reflect"}, (3, 6, 6)),
    "2d one position": ("Conv2d", {"args": (8, 12, 3)}, (8, 3, 3)),
    "2d few positions": ("Conv2d", {"args": (16, 16, 3), "stride": 2, "groups": 2, "padding": 1}, (16, 4, 4)),
    "2d one pixel": ("Conv2d", {"args": (3, 4, 3), "padding": 1}, (3, 1, 1)),
    "2d 1x1": ("Conv2d", {"args": (6, 5, 1)}, (6, 4, 3)),
    "3d": (
        "Conv3d",
        {"args": (2, 3, (1, 2, 3)), "stride": (1, 2, 1), "padding": 1, "dilation": (1, 1, 2)},
        (2, 3, 4, 6),
    ),
}
LINEAR: Final[Cases] = {
    "linear": ("Linear", {"args": (9, 7)}, (9,)),
    "linear, lines": ("Linear", {"args": (9, 7), "bias": False}, (4, 9)),
    "linear, planes": ("Linear", {"args": (5, 3)}, (4, 6, 5)),
}
TRANSPOSED: Final[Cases] = {
    "transposed 1d": ("ConvTranspose1d", {"args": (4, 6, 3), "stride": 2, "padding": 1, "output_padding": 1}, (4, 5)),
    "transposed 2d": (
        "ConvTranspose2d",
        {"args": (4, 6, (2, 3)), "dilation": (4, 1), "output_padding": (3, 0), "groups": 2, "bias": False},
        (4, 3, 4),
    ),
    "transposed 3d": ("ConvTranspose3d", {"args": (2, 3, 2), "stride": (2, 1, 3)}, (2, 2, 3, 2)),
}
STANDARDIZED: Final[Cases] = {**CONVOLUTIONS, **LINEAR, **TRANSPOSED}
WITH_NORMS: Final = [(nn, name) for name in CONVOLUTIONS] + [(pws, name) for name in (*CONVOLUTIONS, *LINEAR)]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def layer_of(room: Any, name: str, **more: Any) -> tuple[Any, Tensor]:
    """A layer far from its initial values, and five samples for it."""
    torch.manual_seed(0)
    kind, settings, shape = STANDARDIZED[name]
    settings = {**settings, **more}
    layer = getattr(room, kind)(*settings.pop("args"), **settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) + 0.3)
        if room is pws:
            layer.alpha[1] = 0.0
    return layer, torch.randn(5, *shape, dtype=torch.float64)


def one_by_one(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Autograd's gradient for each sample alone."""
    named = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    found = [torch.autograd.grad(layer(x[i : i + 1]), list(named.values()), dy[i : i + 1]) for i in range(len(x))]
    return {name: torch.stack(each) for name, each in zip(named, zip(*found, strict=True), strict=True)}


def sampled(sampler: Sampler, layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    found = sampler(layer, [x], dy)
    names: dict[Tensor, str] = {parameter: name for name, parameter in layer.named_parameters()}
    return {names[parameter]: each for parameter, each in found.items()}


def assert_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradients in expected.items():
        assert_close(found[name], gradients, "identity float64")


def assert_norms(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert_gradients(found, {name: gradients.flatten(1).norm(dim=1) for name, gradients in expected.items()})


@pytest.mark.parametrize("at_once", [1, 2**19])
@pytest.mark.parametrize("name", STANDARDIZED)
def test_gradients_are_those_of_each_sample_alone(name: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernel_gradient.AT_ONCE, "cpu", at_once)
    layer, x = layer_of(pws, name, gain="tanh", gamma=0.1, relative_gamma=True)
    dy = torch.randn_like(layer(x))
    found = sampled(pws.private.standardized_grad_sample, layer, x, dy)
    assert_gradients(found, one_by_one(layer, x, dy))
    filters = kernel_gradient.rows(layer, layer.weight)
    means = torch.stack([kernel_gradient.rows(layer, gradient).mean(1) for gradient in found["weight"]])
    assert means.shape == (5, len(filters))
    assert_close(means, torch.zeros_like(means), "float64")


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize(("room", "name"), WITH_NORMS)
def test_norms_are_those_of_each_sample_alone(
    room: Any, name: str, gram: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm_sampler, "takes_gram", lambda *_: gram)
    monkeypatch.setitem(kernel_gradient.AT_ONCE, "cpu", 500)
    layer, x = layer_of(room, name)
    dy = torch.randn_like(layer(x))
    sampler = GradSampleHooksFastGradientClipping.NORM_SAMPLERS[type(layer)]
    assert_norms(sampled(sampler, layer, x, dy), one_by_one(layer, x, dy))


@pytest.mark.parametrize(
    ("room", "sizes", "pixels", "gram"),
    [
        *[(nn, (64, 64, 3), 28, False), (nn, (256, 256, 3), 7, True), (nn, (256, 256, 1), 14, False)],
        *[(pws, (64, 64, 3), 28, False), (pws, (256, 256, 3), 7, True), (pws, (64, 64, 1), 7, False)],
    ],
)
def test_the_cheaper_way_is_taken_and_right(room: Any, sizes: tuple[int, ...], pixels: int, gram: bool) -> None:
    torch.manual_seed(0)
    layer = room.Conv2d(*sizes, padding=sizes[2] // 2).double()
    assert norm_sampler.takes_gram(layer, pixels**2) is gram
    x = torch.randn(2, sizes[0], pixels, pixels, dtype=torch.float64)
    dy = torch.randn_like(layer(x))
    sampler = GradSampleHooksFastGradientClipping.NORM_SAMPLERS[type(layer)]
    assert_norms(sampled(sampler, layer, x, dy), one_by_one(layer, x, dy))


@pytest.mark.parametrize("frozen", ["weight", "alpha", "bias", "weight alpha"])
def test_frozen_parameters_are_left_out(frozen: str) -> None:
    layer, x = layer_of(pws, "2d circular")
    for name in frozen.split():
        layer.get_parameter(name).requires_grad_(False)
    dy = torch.randn_like(layer(x))
    expected = one_by_one(layer, x, dy)
    assert_gradients(sampled(pws.private.standardized_grad_sample, layer, x, dy), expected)
    assert_norms(sampled(pws.private.standardized_norm_sample, layer, x, dy), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    """The backward pass of autocast hands over halves, and may run inside it."""
    layer, x = layer_of(pws, "2d few positions")
    layer, x = layer.float(), x.float()
    with torch.autocast("cpu", dtype):
        dy = 200 * torch.randn_like(layer(x))  # squares overflow in float16
        found = sampled(pws.private.standardized_grad_sample, layer, x, dy)
        norms = sampled(pws.private.standardized_norm_sample, layer, x, dy)
    expected = sampled(pws.private.standardized_grad_sample, layer, x, dy.float())
    for name, gradients in expected.items():
        assert (dy.dtype, found[name].dtype, norms[name].dtype) == (dtype, dtype, torch.float32)
        if name != "bias":
            assert_close(found[name], gradients, str(dtype).removeprefix("torch."))
        assert torch.allclose(norms[name], gradients.flatten(1).norm(dim=1), rtol=2e-5)


def test_weights_whose_squares_overflow() -> None:
    layer, x = layer_of(pws, "2d circular")
    layer, x = layer.float(), x.float()
    layer.weight.data *= 1e25
    dy = torch.randn_like(layer(x))
    for name, gradients in one_by_one(layer, x, dy).items():
        found = sampled(pws.private.standardized_grad_sample, layer, x, dy)[name]
        assert torch.allclose(found, gradients, rtol=1e-4, atol=1e-5 * float(gradients.abs().max()))


def layers() -> nn.Sequential:
    return nn.Sequential(
        *(pws.Conv2d(3, 6, 3), nn.Tanh(), pws.ConvTranspose2d(6, 4, 2, groups=2), nn.Tanh(), nn.Flatten(2)),
        *(pws.Conv1d(4, 32, 5, stride=7), nn.Tanh(), pws.Linear(7, 4), nn.Flatten(), nn.Linear(128, 3)),
    )


def marked() -> nn.Sequential:
    net = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.Tanh(), nn.Conv2d(6, 4, 3, groups=2), nn.GroupNorm(2, 4)),
        *(nn.AdaptiveAvgPool2d(3), nn.Conv2d(4, 40, 3), nn.Flatten(), nn.Linear(40, 3)),
    )
    for number in (0, 2, 5):
        pws.mark(net[number])
    return net


def stepped(
    make: Callable[[], nn.Sequential],
    mode: str,
    clip: float,
    count: int = 8,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> nn.Sequential:
    """The network after two private steps without noise, in float64."""
    torch.manual_seed(0)
    net = make().double().to(memory_format=memory_format)
    images = torch.randn(16, 3, 8, 8, dtype=torch.float64).to(memory_format=memory_format)
    data = TensorDataset(images, torch.randint(3, (16,)))
    sgd: Any = pws.optim.SGD(net, lr=0.3) if make is marked else torch.optim.SGD(net.parameters(), lr=0.3)
    model, optimizer, *criterion, loader = PrivacyEngine().make_private(
        module=net,
        optimizer=sgd,
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(data, 8),
        noise_multiplier=0.0,
        max_grad_norm=clip,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    loss_of: Any = criterion[0] if criterion else nn.CrossEntropyLoss()
    for images, labels in loader:
        optimizer.zero_grad()
        loss_of(model(images[:count].to(memory_format=memory_format)), labels[:count]).backward()  # stacked anew
        optimizer.step()
    return net


@pytest.mark.parametrize("mode", ["ghost", "functorch"])
@pytest.mark.parametrize("make", [layers, marked])
def test_a_clipped_step_is_the_same_in_all_modes(make: Callable[[], nn.Sequential], mode: str) -> None:
    hooked, clip = stepped(make, "hooks", 0.05), 0.05
    for one, other in zip(stepped(make, mode, clip).parameters(), hooked.parameters(), strict=True):
        assert_close(one, other, "trajectory")
    free = stepped(make, "hooks", 1e9)
    assert max(float((a - b).abs().max()) for a, b in zip(free.parameters(), hooked.parameters(), strict=True)) > 1e-3


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_no_samples_give_no_step(mode: str) -> None:
    """Poisson's sampling may draw none."""
    torch.manual_seed(0)
    before = layers().double()
    after = stepped(layers, mode, 1.0, count=0)
    for one, other in zip(after.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "name", [name for name, (kind, *_) in STANDARDIZED.items() if kind in ("Conv1d", "Conv2d", "Conv3d")]
)
def test_gradients_of_torchs_convolutions_are_right_whatever_the_padding(name: str) -> None:
    layer, x = layer_of(nn, name)
    dy = torch.randn_like(layer(x))
    found = sampled(GradSampleHooks.GRAD_SAMPLERS[type(layer)], layer, x, dy)
    assert_gradients(found, one_by_one(layer, x, dy))


def channels_last(images: Tensor) -> Tensor:
    """The same values, those of a position side by side in memory."""
    return images.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.parametrize("of", [GradSampleHooks.GRAD_SAMPLERS, GradSampleHooksFastGradientClipping.NORM_SAMPLERS])
@pytest.mark.parametrize(("room", "name"), WITH_NORMS)
def test_the_memory_format_changes_nothing(room: Any, name: str, of: dict[type, Sampler]) -> None:
    """Opacus' own sampler for convolutions takes every image's memory for contiguous."""
    layer, x = layer_of(room, name)
    dy = torch.randn_like(layer(x))
    found = sampled(of[type(layer)], layer, channels_last(x), channels_last(dy))
    check = assert_gradients if of is GradSampleHooks.GRAD_SAMPLERS else assert_norms
    check(found, one_by_one(layer, x, dy))


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("make", [layers, marked])
def test_a_step_in_channels_last_is_the_same(make: Callable[[], nn.Sequential], mode: str) -> None:
    last = stepped(make, mode, 0.05, memory_format=torch.channels_last)
    for one, other in zip(last.parameters(), stepped(make, mode, 0.05).parameters(), strict=True):
        assert_close(one, other, "trajectory")


def test_a_network_of_layers_needs_no_functorch() -> None:
    model = GradSampleModule(layers())
    assert not any(hasattr(module, "ft_compute_sample_grad") for module in model.modules())


def test_all_layers_are_registered() -> None:
    kinds = {kind for kind in vars(pws).values() if isinstance(kind, type) and issubclass(kind, pws.StandardizedLayer)}
    assert len(kinds) == 8
    assert kinds - set(GradSampleHooks.GRAD_SAMPLERS) == {pws.StandardizedLayer}


def test_missing_opacus_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.grad_sample", None)
    with pytest.raises(pws.PwsError, match=r"pws.private needs opacus.*pip install 'pws-torch\[private\]'"):
        importlib.reload(_register)
