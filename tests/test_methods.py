"""The registry of methods: names, classes, and each convolution against its formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from timm.layers import FilterResponseNormTlu2d, ScaledStdConv2d, StdConv2d
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import pws
from pws.methods import METHODS, build_method
from pws.methods.switch_norm import SwitchNorm2d
from pws.models import build_model


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


def centred(layer: nn.Module) -> Tensor:
    rows = layer.parametrizations.weight.original.flatten(1)
    return (rows - rows.mean(1, keepdim=True)).view_as(layer.parametrizations.weight.original)


def normalizer_free(layer: nn.Module) -> Tensor:
    """`gain (w - m) / sqrt(v + 1e-6)` times ReLU's `1 / sqrt(Var relu)`, over the root of the fan-in (Brock et al. 2021)."""
    return layer.gain * reference.RELU_GAIN * weight_standardized(layer) / layer.weight[0].numel() ** 0.5


Kernel = Callable[[nn.Module], Tensor]
Kind = type[nn.Module] | None
# Name: the convolution's class, its kernel, the head's kernel, the norm, the norm at the ends.
ROWS: dict[str, tuple[type[nn.Module], Kernel, Kernel, Kind, Kind]] = {
    "none": (nn.Conv2d, plain, plain, None, None),
    "bn": (nn.Conv2d, plain, plain, nn.BatchNorm2d, None),
    "frozen-bn": (nn.Conv2d, plain, plain, None, None),
    "gn": (nn.Conv2d, plain, plain, nn.GroupNorm, None),
    "ln": (nn.Conv2d, plain, plain, nn.GroupNorm, None),
    "in": (nn.Conv2d, plain, plain, nn.GroupNorm, None),
    "sn": (nn.Conv2d, plain, plain, SwitchNorm2d, None),
    "frn": (nn.Conv2d, plain, plain, FilterResponseNormTlu2d, None),
    "wn": (nn.Conv2d, weight_normed, weight_normed, None, None),
    "ws": (StdConv2d, weight_standardized, plain, nn.GroupNorm, None),
    "centred": (nn.Conv2d, centred, centred, None, None),
    "gc": (nn.Conv2d, plain, plain, None, None),
    "nf": (ScaledStdConv2d, normalizer_free, plain, None, None),
    "skipinit": (nn.Conv2d, plain, plain, None, None),
    "pws-paper": (nn.Conv2d, plain, plain, None, nn.GroupNorm),
    "pws": (nn.Conv2d, plain, plain, None, None),
}


def disturb(layer: nn.Module) -> nn.Module:
    """Weights with a mean, and no parameter at its initial value, where weight norm is the identity."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.rand_like(parameter))
    return layer


def test_names() -> None:
    assert list(METHODS) == list(ROWS)
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


def test_frozen_norms_need_statistics_that_a_network_at_its_start_has_not() -> None:
    with pytest.raises(pws.PwsError, match=r"frozen-bn keeps the statistics of a trained network.*or use bn"):
        build_model("allconv", build_method("frozen-bn"))


@pytest.mark.parametrize("name", [name for name in ROWS if name != "frozen-bn"])
def test_norms(name: str) -> None:
    method = build_method(name)
    for norm, expected in zip((method.norm, method.end_norm), ROWS[name][3:], strict=True):
        assert (None if norm is None else type(norm(64))) == expected
    if method.end_norm is not None:
        assert method.end_norm(64).num_groups == 1


def over(x: Tensor, *dims: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over `dims`, kept."""
    mean = x.mean(dims, keepdim=True)
    return mean, (x - mean).square().mean(dims, keepdim=True)


# Name: the dimensions of (N, C, H, W) that the published norm averages over.
AVERAGED = {"bn": (0, 2, 3), "ln": (1, 2, 3), "in": (2, 3)}


@pytest.mark.parametrize("name", AVERAGED)
def test_a_norm_averages_over_its_dimensions(name: str) -> None:
    norm = disturb(build_method(name).norm(6))
    x = 3 * torch.randn(4, 6, 5, 5) + 1
    mean, variance = over(x.double(), *AVERAGED[name])
    scale, shift = norm.weight.view(6, 1, 1), norm.bias.view(6, 1, 1)
    assert_close(norm(x), scale * (x - mean) / (variance + 1e-5).sqrt() + shift, "float32")


@pytest.mark.parametrize("name", ["gn", "ws"])
def test_group_norm_averages_over_a_groups_channels(name: str) -> None:
    norm = disturb(build_method(name).norm(6))
    assert norm.num_groups == 3
    x = 3 * torch.randn(4, 6, 5, 5) + 1
    grouped = x.double().reshape(4, 3, 2, 5, 5)
    mean, variance = over(grouped, 2, 3, 4)
    normalized = ((grouped - mean) / (variance + 1e-5).sqrt()).view_as(x)
    assert_close(norm(x), norm.weight.view(6, 1, 1) * normalized + norm.bias.view(6, 1, 1), "float32")


def test_filter_response_norm_divides_by_the_root_mean_square_and_thresholds() -> None:
    """`max(gamma x / sqrt(mean(x^2) + eps) + beta, tau)`, Singh and Krishnan 2020."""
    norm = disturb(build_method("frn").norm(6))
    x = 3 * torch.randn(4, 6, 5, 5) + 1
    square = x.double().square().mean((2, 3), keepdim=True)
    scale, shift, threshold = (p.view(6, 1, 1) for p in (norm.weight, norm.bias, norm.tau))
    assert norm.eps == 1e-5
    assert_close(norm(x), torch.maximum(scale * x / (square + 1e-5).sqrt() + shift, threshold), "float32")
    assert isinstance(build_method("frn").activation(), nn.Identity)


def switched(norm: SwitchNorm2d, x: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Luo et al. 2019, equations 3 to 5, written with the three statistics side by side."""
    statistics = [over(x, 2, 3), over(x, 1, 2, 3), batch]
    p, q = norm.mean_logits.double().softmax(0), norm.var_logits.double().softmax(0)
    mean = sum(p[k] * statistics[k][0] for k in range(3))
    variance = sum(q[k] * statistics[k][1] for k in range(3))
    return norm.weight.view(-1, 1, 1) * (x - mean) / (variance + 1e-5).sqrt() + norm.bias.view(-1, 1, 1)


def test_switchable_norm_mixes_instance_layer_and_batch_statistics() -> None:
    norm = disturb(build_method("sn").norm(6))
    x = 3 * torch.randn(4, 6, 5, 5) + 1
    batch = over(x.double(), 0, 2, 3)
    assert_close(norm(x), switched(norm, x.double(), batch), "float32")
    kept = [b.flatten() for b in (norm.running_mean, norm.running_var)]
    for running, start, seen in zip(kept, (0, 1), batch, strict=True):
        assert_close(running, 0.9 * start + 0.1 * seen.flatten(), "float32")
    norm.eval()
    running = tuple(b.double().view(1, 6, 1, 1) for b in kept)
    assert_close(norm(x), switched(norm, x.double(), running), "float32")
    assert torch.equal(norm.running_mean, kept[0])


def step_with(name: str, **options: Any) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """A network of one convolution and a head whose gradients the method has changed; they before and after."""
    method = build_method(name, **options)
    model = nn.ModuleDict({"conv": method.conv(3, 8, 3, bias=True), "head": method.head(8, 4)})
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) + 0.5
    before = {key: p.grad.clone() for key, p in model.named_parameters()}
    assert method.gradients is not None
    method.gradients(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return model, before, {key: p.grad for key, p in model.named_parameters()}


def test_gradient_centralization_takes_the_mean_from_each_filters_gradient() -> None:
    _, before, after = step_with("gc")
    for key in ("conv.weight", "head.weight"):
        mean = before[key].double().flatten(1).mean(1)
        assert_close(after[key], before[key] - mean.reshape(-1, *[1] * (before[key].dim() - 1)), "float32")
    for key in ("conv.bias", "head.bias"):
        assert torch.equal(before[key], after[key])


@pytest.mark.parametrize("factor", [0.01, 0.1])
def test_nf_clips_each_unit_by_its_weights_norm_but_not_the_head(factor: float) -> None:
    """`g min(1, factor max(|w|, 1e-3) / |g|)`, a unit an output channel (Brock et al. 2021, equation 3)."""
    model, before, after = step_with("nf", clip_factor=factor)
    weight, gradient = model["conv"].weight.double().flatten(1), before["conv.weight"].double().flatten(1)
    allowed = factor * weight.norm(dim=1, keepdim=True).clamp(min=1e-3)
    expected = gradient * (allowed / gradient.norm(dim=1, keepdim=True)).clamp(max=1)
    assert not torch.equal(after["conv.weight"], before["conv.weight"])
    assert_close(after["conv.weight"].flatten(1), expected, "float32")
    for key in ("head.weight", "head.bias"):
        assert torch.equal(before[key], after[key])


@pytest.mark.parametrize("name", ["skipinit", "nf"])
def test_skipinits_branches_end_with_a_scalar_that_starts_at_0(name: str) -> None:
    method = build_method(name)
    conv = method.conv(3, 8, 3, bias=True)
    end = method.end_branch(conv, 8)
    x = torch.randn(2, 3, 5, 5)
    assert not end(x).any()
    nn.init.constant_(end[1].scale, 0.25)
    assert_close(end(x), 0.25 * conv(x).double(), "float32")


@pytest.mark.parametrize("name", ["gn", "ws"])
def test_group_norm_has_32_groups_of_at_least_two_channels(name: str) -> None:
    assert [build_method(name).norm(channels).num_groups for channels in (64, 256, 32, 48, 8)] == [32, 32, 16, 24, 4]


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 6, 12, 29, 58])
def test_group_norm_takes_every_number_of_channels(channels: int) -> None:
    """Width 0.3 makes 29 and 58 of 96 and 192."""
    norm = build_method("gn").norm(channels)
    assert channels % norm.num_groups == 0


@pytest.mark.parametrize("name", [name for name in ROWS if name not in ("wn", "centred", "pws-paper", "pws")])
def test_convolutions_start_kaiming_normal_with_bias_zero(name: str) -> None:
    conv = build_method(name).conv(64, 128, 3, bias=True)
    assert_close(conv.weight.std(), (2 / 576) ** 0.5, "initial deviation")
    assert not conv.bias.any()


def test_weight_norm_starts_as_the_plain_convolution() -> None:
    conv = build_method("wn").conv(64, 128, 3, bias=True)
    assert_close(conv.weight.std(), (2 / 576) ** 0.5, "initial deviation")


@pytest.mark.parametrize(("name", "gain"), [("pws-paper", 2**0.5), ("pws", reference.RELU_GAIN)])
def test_pws_builds_plain_layers_with_a_mark_whose_kernels_start_standardized(name: str, gain: float) -> None:
    """Mean 0, and the deviation `gain / sqrt(n) * sqrt(v / (v + gamma))` of Kaiming's `v = 2 / n`."""
    conv = build_method(name).conv(64, 128, 3, bias=True)
    assert type(conv) is nn.Conv2d
    assert (conv.pws.gain, conv.pws.gamma, conv.pws.relative_gamma) == (pytest.approx(gain), 1e-3, False)
    assert_close(conv.weight.flatten(1).mean(1), torch.zeros(128), "float32")
    v = 2 / 576
    assert_close(conv.weight.std(), gain * 576**-0.5 * (v / (v + 1e-3)) ** 0.5, "initial deviation")
    assert not conv.bias.any()


def test_pws_standardizes_the_head_if_not_told_otherwise_and_the_paper_does_not() -> None:
    heads = [build_method(*given).head(8, 4) for given in (["pws"], ["pws-paper"])]
    heads.append(build_method("pws", standardize_head=False).head(8, 4))
    assert [type(head) for head in heads] == [nn.Linear] * 3
    assert [len(pws.marked(head)) for head in heads] == [1, 0, 0]


def test_options_reach_the_layers() -> None:
    method = build_method("pws", gain="linear", gamma=0.5, relative_gamma=True)
    for layer in (method.conv(3, 4, 3, bias=True), method.head(4, 2)):
        assert layer.pws == pws.Mark(gain=1.0, gamma=0.5, relative_gamma=True)


@pytest.mark.parametrize(("name", "nearest"), [("pw", "pws"), ("BN", None), ("gnn", "gn"), ("batchnorm", None)])
def test_an_unknown_method_is_refused_with_the_nearest(name: str, nearest: str | None) -> None:
    with pytest.raises(pws.PwsError, match=f"unknown method '{name}'") as caught:
        build_method(name)
    message = str(caught.value)
    assert nearest is None or f"did you mean {nearest}" in message
    assert f"Valid: {', '.join(sorted(METHODS))}" in message


@pytest.mark.parametrize("option", ["gamma", "gain", "groups"])
@pytest.mark.parametrize("name", [name for name in ROWS if name not in ("nf", "pws-paper", "pws")])
def test_options_of_another_method_are_refused(name: str, option: str) -> None:
    with pytest.raises(pws.PwsError, match=f"the method {name} has no option '{option}'; it has: none"):
        build_method(name, **{option: 1})


def test_an_unknown_option_of_pws_is_refused_with_those_it_has() -> None:
    with pytest.raises(pws.PwsError, match="no option 'eps'; it has: gain, gamma, relative_gamma"):
        build_method("pws", eps=1)
