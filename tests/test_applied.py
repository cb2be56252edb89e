"""The compared methods in models of others: what is replaced by what, what stays, and the start of training."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import reference
import timm
import torch
import torchvision
from small_detectors import small, two_objects
from timm.layers import FrozenBatchNormAct2d
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import FrozenBatchNorm2d

import pws
from pws.methods import APPLIED, apply_method, build_method
from pws.methods.weights import Scale

pytestmark = pytest.mark.filterwarnings("ignore:.* norms that are taken out")

KEEP_WEIGHTS = ("bn", "frozen-bn", "gn", "ws")
FROZEN = (FrozenBatchNorm2d, FrozenBatchNormAct2d)


def images() -> Tensor:
    return torch.randn(4, 3, 32, 32)


# Name to what builds it, and an example of its inputs. The third has norms that hold an activation, and padding "same".
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=5), images),
    "mobilenet": (lambda: torchvision.models.mobilenet_v3_small(num_classes=5), images),
    "timm": (lambda: timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=5), images),
    "detector": (lambda: small("mask-rcnn-resnet18", head="conv"), two_objects),
}
Given = tuple[nn.Module, Any, list[str]]
Applied = tuple[str, nn.Module, nn.Module, Any]


@torch.no_grad()
def trained(model: nn.Module) -> nn.Module:
    """Its norms hold statistics of some data, and affine parameters of any value."""
    for norm in of_kind(model, _BatchNorm):
        for tensor, low in ((norm.running_mean, -0.5), (norm.running_var, 0.5), (norm.weight, 0.5), (norm.bias, -0.5)):
            tensor.uniform_(low, low + 1)
    return model


def of_kind(model: nn.Module, *kinds: type[nn.Module]) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kinds)]


@pytest.fixture(params=MODELS, scope="module")
def given(request: pytest.FixtureRequest) -> Given:
    """A model, an example of its inputs, and the layers beside its norms."""
    torch.manual_seed(0)
    model, example = (make() for make in MODELS[request.param])
    return trained(model), example, pws.plan(model, example).named("standardize")


@pytest.fixture(params=APPLIED, scope="module")
def applied(request: pytest.FixtureRequest, given: Given) -> Applied:
    """A method, a model, the same with the method, and the example."""
    return request.param, given[0], apply_method(given[0], request.param, given[1]), given[1]


@pytest.mark.parametrize("method", APPLIED)
def test_the_model_is_left_alone(method: str) -> None:
    model = trained(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)).eval()
    before = deepcopy(model)
    result = apply_method(model, method, images())
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not own & {tensor.data_ptr() for tensor in result.state_dict().values()}
    assert str(model) == str(before)
    assert not any(module.training for module in model.modules())
    assert not any(module.training for module in result.modules() if [*module.parameters(), *module.buffers()])
    assert not pws.marked(model)
    for key, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_the_norms_are_those_of_the_method(applied: Applied) -> None:
    method, model, result, _ = applied
    norms: dict[str, tuple[type[nn.Module], ...]] = {"bn": (_BatchNorm,), "frozen-bn": FROZEN}
    norms |= dict.fromkeys(("gn", "ws", "pws-paper"), (nn.GroupNorm,))
    count = 1 if method == "pws-paper" else len(of_kind(model, _BatchNorm)) if method in norms else 0
    assert len(of_kind(result, *norms.get(method, ()))) == count
    assert len(of_kind(result, _BatchNorm, nn.GroupNorm, *FROZEN)) == count
    assert bool(pws.marked(result)) == method.startswith("pws")


def test_outputs_have_their_form(applied: Applied) -> None:
    _, model, result, example = applied
    if isinstance(example, Tensor):
        assert result.train()(example).shape == (4, 5)
        assert result.eval()(example).isfinite().all()
        return
    losses = result.train()(*example)
    assert losses.keys() == deepcopy(model).train()(*example).keys()
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
    assert [set(found) for found in result.eval()(example[0])] == [{"boxes", "labels", "scores", "masks"}] * 2


def test_three_steps_with_gradients_for_all(applied: Applied) -> None:
    result, example = deepcopy(applied[2]).train(), applied[3]
    # Without norms Kaiming's weights double the variance behind each linear bottleneck, and larger rates diverge.
    optimizer = pws.optim.SGD(result, lr=1e-5) if pws.marked(result) else torch.optim.SGD(result.parameters(), lr=1e-5)
    for _ in range(3):
        optimizer.zero_grad()
        if isinstance(example, Tensor):
            loss = F.cross_entropy(result(example), torch.tensor([0, 1, 2, 3]))
        else:
            loss = torch.stack(list(result(*example).values())).sum()
        assert loss.isfinite()
        loss.backward()
        optimizer.step()
    for name, parameter in result.named_parameters():
        assert parameter.grad is not None, name
        # Objects of this size are on some of the levels alone.
        assert parameter.grad.any() or name.startswith(("backbone.fpn", "rpn", "roi_heads")), name


def test_names_outside_of_what_is_replaced_stay(applied: Applied) -> None:
    method, model, result, _ = applied
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, _BatchNorm))
    kept = {key for key in model.state_dict() if not key.startswith(inside)}
    found = {key for key in result.state_dict() if not key.startswith(inside)}
    if method == "nf":
        ends = {name.removesuffix("1") for name, module in result.named_modules() if isinstance(module, Scale)}
        assert ends
        for end in ends:
            found = {key.replace(f"{end}0.", end) for key in found}
    new = {key for key in found - kept if not key.endswith((".bias", ".gain", ".scale"))}
    assert (kept - found, new) == (set(), set())


def test_weights_are_kept_or_drawn_anew(applied: Applied, given: Given) -> None:
    method, model, result, _ = applied
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            found: Any = result.get_submodule(name)
            found = found[0] if isinstance(found, nn.Sequential) else found
            assert torch.equal(module.weight, found.weight) == (method in KEEP_WEIGHTS or name not in given[2]), name


@pytest.mark.parametrize("method", KEEP_WEIGHTS)
def test_methods_that_keep_the_weights_do_not_warn(method: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_method(trained(stack(2)), method, images())


def test_frozen_norms_compute_what_batch_norm_does_in_eval_mode(given: Given) -> None:
    model = deepcopy(given[0]).double().eval()
    frozen = apply_method(model, "frozen-bn", given[1])
    for norm, other in zip(of_kind(model, _BatchNorm), of_kind(frozen, *FROZEN), strict=True):
        x = torch.randn(2, norm.num_features, 3, 3, dtype=torch.float64)
        assert_close(other.train()(x), norm(x), "float64")
    if isinstance(given[1], Tensor):
        x = given[1].double()
        assert_close(frozen(x), model(x), "identity float64")


def test_weights_go_from_bn_to_frozen_bn_and_back(given: Given) -> None:
    model = given[0]
    other = apply_method(trained(deepcopy(model)), "frozen-bn", given[1])
    other.load_state_dict(model.state_dict())
    back = trained(deepcopy(model))
    back.load_state_dict(other.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], value) or key.endswith("num_batches_tracked"), key


def test_group_norms_have_32_groups_of_two_channels_at_least_and_start_without_scale(applied: Applied) -> None:
    method, model, result, _ = applied
    if method not in ("gn", "ws"):
        return
    for norm, old in zip(of_kind(result, nn.GroupNorm), of_kind(model, _BatchNorm), strict=True):
        channels = old.num_features
        assert norm.num_channels == channels
        assert norm.num_groups == max(g for g in range(1, 33) if channels % g == 0 and channels >= 2 * g)
        assert norm.weight.eq(1).all()
        assert not norm.bias.any()


def standardized(weight: Tensor) -> Tensor:
    """`(w - m) / sqrt(v + 1e-6)` with the biased variance, Qiao et al. 2019."""
    rows = weight.double().flatten(1)
    centred = rows - rows.mean(1, keepdim=True)
    return (centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()).view_as(weight)


def test_convolutions_of_timm_are_the_plain_ones_with_the_formulas_kernel(applied: Applied, given: Given) -> None:
    """Strides, padding, dilation and groups are those of the layers before. nf has ReLU's `1 / sqrt(Var relu)` over the root of
    the fan-in in front (Brock et al. 2021)."""
    method, model, result, _ = applied
    if method not in ("ws", "nf"):
        return
    result = deepcopy(result).double()
    replaced = 0
    for name, old in model.named_modules():
        if not isinstance(old, nn.Conv2d):
            continue
        new: Any = result.get_submodule(name)
        new = new[0] if isinstance(new, nn.Sequential) else new
        if type(new) is type(old):
            continue
        scale = {"ws": 1.0, "nf": reference.RELU_GAIN / new.weight[0].numel() ** 0.5}[method]
        x = torch.randn(1, old.in_channels, 9, 9, dtype=torch.float64)
        same = deepcopy(old).double()
        same.weight.data.copy_(scale * standardized(new.weight))
        assert_close(new(x), same(x) if new.bias is None else same(x) + new.bias.view(-1, 1, 1), "float64")
        replaced += 1
    assert replaced == {"ws": len(of_kind(model, _BatchNorm)), "nf": len(given[2])}[method]


def test_branches_of_nf_add_nothing_at_the_start() -> None:
    result = apply_method(MODELS["resnet18"][0](), "nf", images())
    blocks = of_kind(result, BasicBlock)
    assert len(of_kind(result, Scale)) == len(blocks) == 8
    for block in blocks:
        x = torch.randn(2, block.conv1.in_channels, 8, 8)
        shortcut = x if block.downsample is None else block.downsample(x)
        assert_close(block(x), shortcut.relu(), "exact")
        nn.init.ones_(block.conv2[1].scale)
        branch = block.conv2[0](block.conv1(x).relu())
        assert branch.std() > 0.1
        assert_close(block(x), (shortcut + branch).relu(), "float32")


def test_nf_clips_the_gradients_of_its_layers_and_of_no_other() -> None:
    """`|g| <= 0.01 |w|` for each filter; those that predict keep theirs."""
    model = apply_method(MODELS["timm"][0](), "nf", images())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    method = build_method("nf")
    assert method.gradients is not None
    method.gradients(model, torch.optim.SGD(model.parameters()))
    classifier = ("classifier.weight", "classifier.bias", "conv_head.weight", "conv_head.bias")
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.ones_like(parameter)) == (name in classifier), name
    weight = model.get_parameter("conv_stem.weight")
    lengths = [tensor.flatten(1).norm(dim=1) for tensor in (weight.grad, weight)]
    assert_close(lengths[0], 0.01 * lengths[1], "float32")


def test_a_pyramid_of_nf_adds_something_at_the_start() -> None:
    """Its additions are no residual branches."""
    result = apply_method(small("faster-rcnn-resnet18"), "nf", two_objects())
    scales = [name for name, module in result.named_modules() if isinstance(module, Scale)]
    assert scales == [f"backbone.body.layer{n}.{block}.conv2.1" for n in range(1, 5) for block in (0, 1)]
    assert all(level.std() > 1e-3 for level in result.backbone(torch.randn(1, 3, 64, 64)).values())


def stack(depth: int = 8) -> nn.Sequential:
    """VGG-like, with one transposed convolution, whose filters are as many as its inputs are not."""
    widths = [3, 64, 64, 64, 128, 64, 64, 64, 64]
    layers: list[nn.Module] = []
    for number, (before, width) in enumerate(pairwise(widths[: depth + 1])):
        kind = nn.ConvTranspose2d if number == 3 else nn.Conv2d
        layers += [kind(before, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers)


def test_none_keeps_hes_variance() -> None:
    """Kaiming's weights give each layer the output variance 2 on normal noise: `n * 2 / n * E[x^2]`, and half of a normal
    output's square passes a ReLU."""
    x = torch.randn(8, 3, 32, 32)
    result = apply_method(stack(), "none", x)
    layers = of_kind(result, nn.Conv2d, nn.ConvTranspose2d)
    assert len(layers) == 8
    for module in result:
        x = module(x)
        if module in layers:
            assert 1 < x.var() < 4
            assert not module.bias.any()


def test_pws_paper_has_the_papers_constants_and_one_norm() -> None:
    torch.manual_seed(1)
    result = apply_method(MODELS["resnet18"][0](), "pws-paper", images())
    marks = pws.marked(result)
    assert len(marks) == 20
    assert set(marks.values()) == {pws.Mark(gain=2**0.5, gamma=1e-3)}
    assert "fc" not in marks
    assert {name: norm.num_groups for name, norm in result.named_modules() if isinstance(norm, nn.GroupNorm)} == {
        "bn1": 1
    }
    for name in marks:
        layer = result.get_submodule(name)
        n = layer.weight[0].numel()
        assert_close(layer.weight.flatten(1).mean(1), torch.zeros(len(layer.weight)), "float32")
        expected = (2 / n) ** 0.5 * (2 / n / (2 / n + 1e-3)) ** 0.5
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.02), name
        assert not layer.bias.any()


def test_the_one_norm_of_pws_paper_keeps_the_activation_that_the_first_norm_held() -> None:
    result = apply_method(MODELS["timm"][0](), "pws-paper", images())
    assert [name for name, module in result.named_modules() if isinstance(module, nn.GroupNorm)] == ["bn1.0"]
    x = torch.randn(2, 16, 4, 4)
    assert_close(result.bn1(x), F.group_norm(x, 1).relu(), "float32")


@pytest.mark.parametrize("method", ["pws", "pws-paper"])
def test_options_reach_the_marks(method: str) -> None:
    options: dict[str, Any] = {"gamma": 0.5} | ({"relative_gamma": True} if method == "pws" else {})
    found = pws.marked(apply_method(stack(2), method, torch.randn(4, 3, 16, 16), **options))
    assert {(mark.gamma, mark.relative_gamma) for mark in found.values()} == {(0.5, method == "pws")}


def test_pws_is_the_conversion() -> None:
    model, x = stack(3), torch.randn(4, 3, 16, 16)
    converted, found = pws.convert(model, x), apply_method(model, "pws", x)
    assert pws.marked(found) == pws.marked(converted)
    for key, value in converted.state_dict().items():
        assert torch.equal(found.state_dict()[key], value)


@pytest.mark.parametrize("method", ["frozen-bn", "gn", "ws"])
def test_a_norm_at_two_places_is_replaced_at_both(method: str) -> None:
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Conv2d(4, 4, 1), norm)
    result = apply_method(model, method, torch.randn(2, 3, 4, 4))
    assert result[1] is result[3]
    assert not of_kind(result, _BatchNorm)


@pytest.mark.parametrize("method", ["gn", "ws"])
def test_frozen_stages_stay_and_trained_ones_behind_frozen_norms_change(method: str) -> None:
    stem = [nn.Conv2d(3, 4, 3).requires_grad_(False), FrozenBatchNorm2d(4)]
    model = nn.Sequential(*stem, nn.Conv2d(4, 4, 3), FrozenBatchNorm2d(4))
    result = apply_method(model, method, torch.randn(2, 3, 8, 8))
    convolution = nn.Conv2d if method == "gn" else timm.layers.StdConv2d
    assert [type(module) for module in result] == [nn.Conv2d, FrozenBatchNorm2d, convolution, nn.GroupNorm]


@pytest.mark.parametrize("method", ["frozen-bn", "gn", "ws", "nf"])
def test_dtype_and_hooks_stay(method: str) -> None:
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)
    model = nn.Sequential(conv, norm).double()
    conv.weight.requires_grad_(False)
    calls: list[int] = []
    for module in model:
        module.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    result = apply_method(model, method, x)
    calls.clear()
    result(x)
    assert len(calls) == 2
    assert {tensor.dtype for tensor in result.state_dict().values() if tensor.is_floating_point()} == {torch.float64}
    assert not result[0].weight.requires_grad
    assert {name for name, parameter in result[0].named_parameters() if parameter.requires_grad} == {"bias"}


def test_ws_leaves_filters_of_one_entry_and_other_paddings_plain() -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")]
    model = nn.Sequential(*(module for layer in layers for module in (layer, nn.BatchNorm2d(4))))
    result = apply_method(model, "ws", torch.randn(2, 3, 8, 8))
    assert [type(layer) for layer in result[::2]] == [timm.layers.StdConv2d, nn.Conv2d, nn.Conv2d]
    assert len(of_kind(result, nn.GroupNorm)) == 3


def test_ws_standardizes_layers_that_all_levels_of_a_pyramid_share() -> None:
    class Levels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.bn = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
            self.conv, self.norm, self.last = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 3)

        def forward(self, x: Tensor) -> list[Tensor]:
            x = self.bn(self.stem(x))
            return [self.last(self.norm(self.conv(level))) for level in (x, x[..., ::2, ::2])]

    result = apply_method(Levels(), "ws", torch.randn(2, 3, 32, 32))
    kinds = [timm.layers.StdConv2d, nn.GroupNorm, timm.layers.StdConv2d, nn.GroupNorm, nn.Conv2d]
    assert [type(module) for module in result.children()] == kinds


class Double(nn.BatchNorm2d):
    """A norm that does more."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def of_layers(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


VOLUME = (nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4))
WRONG: dict[str, tuple[str, nn.Module, Any, str]] = {
    "no norm": ("gn", nn.Conv2d(3, 4, 3), {}, "takes the place of BatchNorm, and Conv2d has none"),
    "no norm to take out": ("none", nn.Conv2d(3, 4, 3), {}, "Conv2d has no norm to take out"),
    "volume": ("frozen-bn", of_layers(*VOLUME), {}, "frozen-bn is for BatchNorm2d.*got BatchNorm3d.*Use bn or gn"),
    "volume ws": ("ws", of_layers(*VOLUME), {}, "ws is for 2-d convolutions.*Sequential has none"),
    "volume nf": ("nf", of_layers(*VOLUME), {}, "nf is for 2-d convolutions.*Sequential has none"),
    "statistics": (
        *("frozen-bn", of_layers(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), {}),
        "frozen-bn is for BatchNorm2d with running statistics",
    ),
    "option": ("none", stack(1), {"gamma": 1.0}, "the method none has no option 'gamma'; it has: none"),
    "option of pws": (
        "pws",
        stack(1),
        {"gain": 1.0},
        "the method pws has no option 'gain'; it has: gamma, relative_gamma",
    ),
    "unknown": ("bm", stack(1), {}, "unknown method for a model of others 'bm'; did you mean bn"),
    "not for others": (
        "skipinit",
        stack(1),
        {},
        "unknown method for a model of others 'skipinit'.*Valid: bn, frozen-bn, gn",
    ),
    **{
        f"own forward {method}": (
            method,
            of_layers(nn.Conv2d(3, 4, 3), Double(4)),
            {},
            "a forward of its own.*Use method bn",
        )
        for method in ("frozen-bn", "gn", "ws")
    },
    **{
        f"a norm that must stay {method}": (
            *(
                method,
                of_layers(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, groups=4), nn.BatchNorm2d(4)),
                {},
            ),
            "'3' has to stay: it normalizes 2.*one entry",
        )
        for method in ("none", "nf", "pws-paper")
    },
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_possible_is_refused(case: str) -> None:
    method, model, options, message = WRONG[case]
    side = (8, 8, 8) if case.startswith("volume") else (8, 8)
    with pytest.raises(pws.PwsError, match=message):
        apply_method(model, method, torch.randn(2, 3, *side), **options)
