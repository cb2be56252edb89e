"""The networks: every one with every method, and their structure against torchvision's and the paper's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torchvision
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn import functional as F

import pws
from pws.methods import METHODS, build_method
from pws.methods.weights import Scale
from pws.models import MODELS, build_model

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def on_meta(name: str, method: str, **settings: Any) -> nn.Module:
    with torch.device("meta"):
        return build_model(name, build_method(method), **settings)


def of_kind(model: nn.Module, *kinds: type[nn.Module]) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kinds)]


def test_names() -> None:
    stacks = {f"stack{depth}" for depth in (4, 8, 10, 16, 20, 32, 100)}
    preacts = {"preact", "preact11", "preact29", "preact101"}
    wide = {"wrn16-4", "wrn40-4"}
    assert set(MODELS) == {"allconv", "cifar-resnet18", "cifar-resnet34", *wide, *preacts, *RESNETS, *stacks}


@pytest.mark.parametrize("depth", [4, 8, 10, 16, 20, 32, 100])
def test_a_stack_has_its_depth_and_two_strides(depth: int) -> None:
    convs = of_kind(on_meta(f"stack{depth}", "none"), nn.Conv2d)
    assert len(convs) == depth
    assert [i for i, conv in enumerate(convs) if conv.stride == (2, 2)] == [depth // 3, 2 * depth // 3]


@pytest.mark.parametrize("method", [name for name in METHODS if name != "frozen-bn"])
@pytest.mark.parametrize("name", MODELS)
def test_every_network_trains_with_every_method(name: str, method: str) -> None:
    net = build_model(name, build_method(method), in_channels=1, num_classes=7, width=0.125)
    for scale in of_kind(net, Scale):
        nn.init.constant_(scale.scale, 0.5)  # at 0, where it starts, it stops every gradient of its branch
    side = 64 if name in RESNETS else 16
    logits = net(torch.randn(2, 1, side, side))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    F.cross_entropy(logits, torch.tensor([0, 6])).backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), f"{key} does not take part"


@pytest.mark.parametrize(("name", "published"), [("wrn16-4", 2.7e6), ("wrn40-4", 8.9e6)])
def test_wide_networks_have_the_published_number_of_parameters(name: str, published: float) -> None:
    """Zagoruyko and Komodakis 2016, tables 4 and 5, in millions to a digit."""
    count = sum(parameter.numel() for parameter in on_meta(name, "bn").parameters())
    assert count == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize("name", RESNETS)
def test_convolutions_have_as_many_weights_as_torchvisions(name: str) -> None:
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name)
    ours = on_meta(name, "none", num_classes=1000)
    counts = [sum(conv.weight.numel() for conv in of_kind(net, nn.Conv2d)) for net in (ours, theirs)]
    assert counts[0] == counts[1]
    assert ours.head.weight.shape == theirs.fc.weight.shape


def test_resnet50_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        theirs = torchvision.models.resnet50()
    ours = on_meta("resnet50", "pws-paper")
    without_head = [
        sum(p.numel() for key, p in net.named_parameters() if not key.startswith(("fc.", "head.")))
        for net in (ours, theirs)
    ]
    # The published alpha, one a channel, is in the optimizer's state.
    alphas, end_norms = sum(conv.out_channels for conv in of_kind(ours, nn.Conv2d)), 2 * 64 + 2 * 2048
    assert [without_head[0] + alphas, without_head[1]] == [23_512_256, 23_512_256 - end_norms]


@pytest.mark.parametrize(("name", "layers"), [("preact11", 11), ("preact29", 29), ("preact", 56), ("preact101", 101)])
def test_a_preact_has_its_depth(name: str, layers: int) -> None:
    """Layers in a row: the stem, three convolutions a block, the head."""
    net = on_meta(name, "none")
    assert 2 + sum(len(block.convs) for block in net.blocks) == layers


def test_allconv_is_the_published_structure() -> None:
    net = on_meta("allconv", "none")
    convs = [(c.in_channels, c.out_channels, c.kernel_size[0], c.padding[0]) for c in of_kind(net, nn.Conv2d)]
    assert convs == [
        *[(3, 96, 3, 1), (96, 96, 3, 1), (96, 96, 3, 1)],
        *[(96, 192, 3, 1), (192, 192, 3, 1), (192, 192, 3, 1)],
        *[(192, 192, 3, 0), (192, 192, 1, 0), (192, 192, 1, 0)],
    ]
    order = "".join(
        {"Conv2d": "c", "ReLU": "r", "MaxPool2d": "m", "AdaptiveAvgPool2d": "a"}.get(type(m).__name__, "")
        for m in net.features
    )
    assert order == "crcrcrm" * 2 + "crcrcra"
    assert (net.head.in_features, net.head.out_features) == (192, 10)


def test_preact_is_the_published_structure() -> None:
    net = on_meta("preact", "none")
    assert (net.stem.kernel_size, net.stem.out_channels, net.stem.stride) == ((3, 3), 64, (1, 1))
    middle = [(block.convs[1].out_channels, block.convs[1].stride[0]) for block in net.blocks]
    assert middle == [(16, 2), *[(16, 1)] * 5, (32, 2), *[(32, 1)] * 5, (64, 1), *[(64, 1)] * 5]
    assert [conv.kernel_size[0] for conv in net.blocks[7].convs] == [1, 3, 1]
    assert net.head.in_features == 256


@pytest.mark.parametrize("name", MODELS)
def test_pws_has_no_norm_and_standardizes_every_layer(name: str) -> None:
    net = on_meta(name, "pws")
    assert not [m for m in net.modules() if "norm" in type(m).__name__.lower()]
    layers = of_kind(net, nn.Conv2d, nn.Linear)
    assert len(layers) >= 5
    assert {net.get_submodule(key) for key in pws.marked(net)} == set(layers)
    assert all(layer.bias is not None for layer in layers)


@pytest.mark.parametrize(
    ("name", "blocks"), [("preact", 18), ("preact101", 33), ("cifar-resnet18", 8), ("resnet50", 16)]
)
def test_the_branches_of_pws_share_the_variance(name: str, blocks: int) -> None:
    nets = []
    for method in (build_method("pws"), replace(build_method("pws"), end_branch=None)):
        torch.manual_seed(0)
        nets.append(build_model(name, method, width=0.125))
    shared, unshared = nets
    assert len(shared.blocks) == blocks
    for block, other in zip(shared.blocks, unshared.blocks, strict=True):
        *convs, last = zip(block.convs, other.convs, strict=True)
        assert all(torch.equal(ours.weight, theirs.weight) for ours, theirs in convs)
        assert_close(last[0].weight, last[1].weight * blocks**-0.5, "float32")


@pytest.mark.parametrize("name", ["preact", "preact101", "cifar-resnet18"])
def test_the_stream_of_pws_keeps_its_variance_over_the_depth(name: str) -> None:
    """From the stem's variance to about twice that, whatever the depth."""
    net = build_model(name, build_method("pws"), width=1.0)
    seen: list[Tensor] = []
    for module in (net.stem, net.blocks):
        module.register_forward_hook(lambda layer, inputs, output: seen.append(output.var()))
    with torch.no_grad():
        net(torch.randn(8, 3, 32, 32))
    assert 0.25 < float(seen[1] / seen[0]) / 2 < 4


@pytest.mark.parametrize("name", MODELS)
def test_the_published_pws_keeps_two_one_group_norms_in_resnets_and_none_elsewhere(name: str) -> None:
    net = on_meta(name, "pws-paper")
    norms = [m for m in net.modules() if "norm" in type(m).__name__.lower()]
    if name.startswith(("allconv", "preact", "stack")):
        assert not norms
    else:
        assert [type(norm) for norm in norms] == [nn.GroupNorm] * 2
        assert [norm.num_groups for norm in norms] == [1, 1]
        assert norms == [net.stem_norm, net.head_norm]


@pytest.mark.parametrize("method", ["bn", "gn", "ws"])
@pytest.mark.parametrize("name", ["allconv", "cifar-resnet18", "preact"])
def test_a_normalized_network_norms_every_convolution_and_leaves_out_its_bias(name: str, method: str) -> None:
    net = on_meta(name, method)
    convs, norms = of_kind(net, nn.Conv2d), of_kind(net, nn.BatchNorm2d, nn.GroupNorm)
    assert all(conv.bias is None for conv in convs)
    # In front of each convolution but the stem and the shortcuts, which share their block's; and before the head.
    shortcuts = sum(block.shortcut is not None for block in getattr(net, "blocks", []))
    assert len(norms) == len(convs) - shortcuts


@pytest.mark.parametrize("name", ["preact", "cifar-resnet18", "resnet50"])
def test_pws_blocks_start_with_relu_and_nothing_follows_the_addition(name: str) -> None:
    net = build_model(name, build_method("pws-paper"), width=0.125)
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []
    for module in net.modules():
        module.register_forward_hook(lambda layer, inputs, output: seen.append((layer, inputs[0], output)))
    net(torch.randn(2, 3, 32, 32))
    flow = {layer: (entered, left) for layer, entered, left in seen}
    for block in net.blocks:
        stream, out = flow[block]
        assert stream.min() < 0
        assert torch.equal(flow[block.convs[0]][0], F.relu(stream))
        identity = stream if block.shortcut is None else flow[block.shortcut][1]
        if block.shortcut is not None:
            assert torch.equal(flow[block.shortcut][0], F.relu(stream))
        for before, after in zip(block.convs, block.convs[1:], strict=False):
            assert torch.equal(flow[after][0], F.relu(flow[before][1]))
        scale = 0.5**0.5 if name == "preact" else 1.0
        assert_close(out, (identity + flow[block.convs[-1]][1]) * scale, "float32")


@pytest.mark.parametrize(
    ("name", "method"), [("preact", "none"), ("preact", "pws-paper"), ("preact", "wn"), ("resnet18", "none")]
)
def test_methods_without_norm_divide_the_stream_by_the_root_of_two(name: str, method: str) -> None:
    assert {block.scale for block in on_meta(name, method).blocks} == {2**-0.5}


@pytest.mark.parametrize(
    ("name", "method"),
    [("preact", "bn"), ("resnet18", "pws"), ("preact", "pws"), ("preact", "nf"), ("cifar-resnet18", "gn")],
)
def test_other_methods_do_not_divide_the_stream(name: str, method: str) -> None:
    assert {block.scale for block in on_meta(name, method).blocks} == {1.0}


@pytest.mark.parametrize(("name", "blocks"), [("cifar-resnet18", 8), ("resnet50", 16), ("preact", 18)])
def test_initalpha_is_for_the_stem_and_the_first_convolution_of_each_block(name: str, blocks: int) -> None:
    net = on_meta(name, "pws")
    names = {key for key, module in net.named_modules() if module in net.initalpha_layers()}
    assert names == {"stem", *(f"blocks.{i}.convs.0" for i in range(blocks))}


def by_hand(p: dict[str, Tensor], images: Tensor) -> Tensor:
    """CIFAR ResNet-18 without normalization, written out: two basic blocks a stage, later stages start with stride 2."""
    x = F.conv2d(images, p["stem.weight"], p["stem.bias"], padding=1)
    for i in range(8):
        stride = 2 if i in (2, 4, 6) else 1
        active = F.relu(x)
        if stride == 2:
            x = F.conv2d(active, p[f"blocks.{i}.shortcut.weight"], p[f"blocks.{i}.shortcut.bias"], stride=2)
        branch = F.conv2d(active, p[f"blocks.{i}.convs.0.weight"], p[f"blocks.{i}.convs.0.bias"], stride, padding=1)
        branch = F.conv2d(F.relu(branch), p[f"blocks.{i}.convs.1.weight"], p[f"blocks.{i}.convs.1.bias"], padding=1)
        x = (x + branch) / 2**0.5
    return F.linear(F.relu(x).mean((2, 3)), p["head.weight"], p["head.bias"])


def test_the_plain_resnet_equals_the_one_written_by_hand() -> None:
    net = build_model("cifar-resnet18", build_method("none"), in_channels=1, num_classes=7, width=0.125).double()
    parameters = dict(net.named_parameters())
    for parameter in parameters.values():
        nn.init.normal_(parameter, std=0.2)
    images = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    ours, theirs = net(images), by_hand(parameters, images)
    assert theirs.std() > 1e-3
    assert_close(ours, theirs, "float64")


def test_the_imagenet_stem_is_torchvisions() -> None:
    net, theirs = on_meta("resnet18", "none"), torchvision.models.resnet18()
    for ours, expected in (net.stem, theirs.conv1), (net.pool, theirs.maxpool):
        for setting in ("kernel_size", "stride", "padding"):
            assert getattr(ours, setting) in (getattr(expected, setting), (getattr(expected, setting),) * 2)
    assert [b.convs[0].stride[0] for b in net.blocks] == [1, 1, 2, 1, 2, 1, 2, 1]
    assert isinstance(on_meta("cifar-resnet18", "none").pool, nn.Identity)


@pytest.mark.parametrize(("width", "channels"), [(1.0, 64), (0.5, 32), (0.125, 8), (2.0, 128), (1e-3, 1)])
def test_width_scales_every_layer(width: float, channels: int) -> None:
    net = on_meta("cifar-resnet18", "none", width=width, num_classes=10)
    assert net.stem.out_channels == channels
    assert net.head.in_features == max(1, round(512 * width))
    assert net.head.out_features == 10


@pytest.mark.parametrize("settings", [{"in_channels": 0}, {"num_classes": 0}, {"width": 0}, {"width": float("inf")}])
def test_counts_outside_their_range_are_refused(settings: dict[str, Any]) -> None:
    ((key, value),) = settings.items()
    with pytest.raises(pws.PwsError, match=f"positive width; got .*{key}={value}"):
        on_meta("allconv", "none", **settings)


def test_an_unknown_network_is_refused_with_the_nearest() -> None:
    with pytest.raises(pws.PwsError, match=r"unknown model 'resnet5'; did you mean .*resnet50"):
        on_meta("resnet5", "none")
