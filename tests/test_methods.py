"""The registry of methods: names, classes, and each convolution against its formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import reference
import torch
from timm.layers import StdConv2d
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import pws
from pws.methods import METHODS, build_method


def plain(layer: nn.Module) -> Tensor:
    return layer.weight


def weight_normed(layer: nn.Module) -> Tensor:
    """`g v / ||v||` (Salimans and Kingma 2016), one length a filter."""
    g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    return g * v / v.square().flatten(1).sum(1).sqrt().reshape(g.shape)


def weight_standardized(layer: nn.Module) -> Tensor:
    """`(w - m) / sqrt(v + 1e-6)`, biased variance (timm's StdConv2d)."""
    rows = layer.weight.flatten(1)
    centred = rows - rows.mean(1, keepdim=True)
    return (centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()).view_as(layer.weight)


def parametric(layer: nn.Module) -> Tensor:
    return reference.kernel(layer.weight, layer.alpha)


Kernel = Callable[[nn.Module], Tensor]
# Name: the convolution's class, its kernel, the head's kernel, the norm, the norm at the ends.
ROWS: dict[str, tuple[type[nn.Module], Kernel, Kernel, type[nn.Module] | None, type[nn.Module] | None]] = {
    "none": (nn.Conv2d, plain, plain, None, None),
    "bn": (nn.Conv2d, plain, plain, nn.BatchNorm2d, None),
    "gn": (nn.Conv2d, plain, plain, nn.GroupNorm, None),
    "wn": (nn.Conv2d, weight_normed, weight_normed, None, None),
    "ws": (StdConv2d, weight_standardized, plain, nn.GroupNorm, None),
    "pws": (pws.Conv2d, parametric, parametric, None, nn.GroupNorm),
}


def disturb(layer: nn.Module) -> nn.Module:
    """Weights with a mean, and no parameter at its initial value, where weight norm is the identity."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.rand_like(parameter))
    return layer


def test_names() -> None:
    assert list(METHODS) == list(ROWS) == ["none", "bn", "gn", "wn", "ws", "pws"]
    assert [build_method(name).name for name in METHODS] == list(METHODS)
    assert all(build_method(name).source for name in METHODS)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ROWS)
def test_the_convolution_is_its_formula(name: str, bias: bool) -> None:
    kind, kernel, _, _, _ = ROWS[name]
    layer = disturb(build_method(name).conv(3, 8, 3, stride=2, padding=1, bias=bias))
    assert issubclass(parametrize.type_before_parametrizations(layer), kind)
    assert (layer.bias is not None) is bias
    x = torch.randn(2, 3, 7, 7)
    offset = layer.bias.double() if bias else None
    expected = F.conv2d(x.double(), kernel(layer).double(), offset, stride=2, padding=1)
    assert_close(layer(x), expected, "float32")
    if kernel is not plain:
        assert (layer(x) - F.conv2d(x, first_weight(layer), layer.bias, 2, 1)).abs().max() > 0.1


def first_weight(layer: nn.Module) -> Tensor:
    """The parameter that is not a scale."""
    return max(layer.parameters(), key=Tensor.numel)


@pytest.mark.parametrize("name", ROWS)
def test_the_head_is_its_formula(name: str) -> None:
    layer = disturb(build_method(name).head(5, 4))
    assert issubclass(parametrize.type_before_parametrizations(layer), nn.Linear)
    x = torch.randn(3, 5)
    assert_close(layer(x), F.linear(x.double(), ROWS[name][2](layer).double(), layer.bias.double()), "float32")


@pytest.mark.parametrize("name", ROWS)
def test_norms(name: str) -> None:
    method = build_method(name)
    for norm, expected in zip((method.norm, method.end_norm), ROWS[name][3:], strict=True):
        assert (None if norm is None else type(norm(64))) == expected
    if method.end_norm is not None:
        assert method.end_norm(64).num_groups == 1


@pytest.mark.parametrize("name", ["gn", "ws"])
def test_group_norm_has_32_groups_of_at_least_two_channels(name: str) -> None:
    assert [build_method(name).norm(channels).num_groups for channels in (64, 256, 32, 48, 8)] == [32, 32, 16, 24, 4]


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 6, 12, 29, 58])
def test_group_norm_takes_every_number_of_channels(channels: int) -> None:
    """Width 0.3 makes 29 and 58 of 96 and 192."""
    norm = build_method("gn").norm(channels)
    assert channels % norm.num_groups == 0


@pytest.mark.parametrize("name", ["none", "bn", "gn", "ws", "pws"])
def test_convolutions_start_kaiming_normal_with_bias_zero(name: str) -> None:
    conv = build_method(name).conv(64, 128, 3, bias=True)
    assert_close(conv.weight.std(), (2 / 576) ** 0.5, "initial deviation")
    assert not conv.bias.any()


def test_weight_norm_starts_as_the_plain_convolution() -> None:
    conv = build_method("wn").conv(64, 128, 3, bias=True)
    assert_close(conv.weight.std(), (2 / 576) ** 0.5, "initial deviation")


def test_options_reach_the_layers() -> None:
    method = build_method("pws", gain="linear", gamma=0.5, relative_gamma=True)
    for layer in (method.conv(3, 4, 3, bias=True), method.head(4, 2)):
        assert (layer.gain, layer.gamma, layer.relative_gamma) == (1.0, 0.5, True)


@pytest.mark.parametrize(("name", "nearest"), [("pw", "pws"), ("BN", None), ("gnn", "gn"), ("batchnorm", None)])
def test_an_unknown_method_is_refused_with_the_nearest(name: str, nearest: str | None) -> None:
    with pytest.raises(pws.PwsError, match=f"unknown method '{name}'") as caught:
        build_method(name)
    message = str(caught.value)
    assert nearest is None or f"did you mean {nearest}" in message
    assert "Valid: bn, gn, none, pws, wn, ws" in message


@pytest.mark.parametrize("option", ["gamma", "gain", "groups"])
@pytest.mark.parametrize("name", ["none", "bn", "gn", "wn", "ws"])
def test_options_of_another_method_are_refused(name: str, option: str) -> None:
    with pytest.raises(pws.PwsError, match=f"the method {name} has no option '{option}'; it has: none"):
        build_method(name, **{option: 1})


def test_an_unknown_option_of_pws_is_refused_with_those_it_has() -> None:
    with pytest.raises(pws.PwsError, match="no option 'eps'; it has: gain, gamma, relative_gamma"):
        build_method("pws", eps=1)
