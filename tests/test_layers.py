"""The layers against `torch.nn.functional` with the float64 reference's kernel, and everything around `forward`."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from itertools import permutations
from typing import Any

import pytest
import reference
import torch
from tolerances import assert_close
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pws

NAMES = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Linear")
# Not the quadrature's number, which is 3e-11 off.
GAIN = {"gain": reference.RELU_GAIN}


def build(name: str, **settings: Any) -> nn.Module:
    """A small layer with 4 inputs, 6 outputs and, for convolutions, kernel size 3."""
    return getattr(pws, name)(4, 6, *([] if name == "Linear" else [3]), **settings)


def inputs(layer: nn.Module, samples: int = 2) -> Tensor:
    return torch.randn(samples, 4, *[5] * (layer.weight.dim() - 2), dtype=layer.weight.dtype)


def disturb(layer: nn.Module) -> nn.Module:
    """Parameters away from their initial values, so that each one matters."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return layer


def reference_kernel(layer: nn.Module) -> Tensor:
    settings = {"gain": layer.gain, "gamma": layer.gamma, "relative": layer.relative_gamma}
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return reference.transposed_kernel(layer.weight, layer.alpha, layer.groups, **settings)
    return reference.kernel(layer.weight, layer.alpha, **settings)


def reference_output(layer: nn.Module, x: Tensor) -> Tensor:
    """The output of a layer with default settings."""
    function = {"Linear": "linear"}.get(type(layer).__name__, type(layer).__name__.lower())
    function = function.replace("convtranspose", "conv_transpose")
    return getattr(F, function)(x.double(), reference_kernel(layer), layer.bias.double())


@pytest.mark.parametrize("name", NAMES)
def test_signature_is_the_parents_then_three_keywords(name: str) -> None:
    ours = list(inspect.signature(getattr(pws, name)).parameters.values())
    theirs = list(inspect.signature(getattr(nn, name)).parameters.values())
    told = [[(p.name, p.default, p.kind) for p in parameters] for parameters in (ours, theirs)]
    keyword = inspect.Parameter.KEYWORD_ONLY
    extra = [("gamma", 1e-3, keyword), ("relative_gamma", False, keyword), ("gain", "relu", keyword)]
    assert told[0] == told[1] + extra


@pytest.mark.parametrize("name", NAMES)
def test_every_position_means_what_it_means_in_torch(name: str) -> None:
    """All of the parent's arguments by position, none at its default: each attribute must agree."""
    values: dict[str, Any] = {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1, "groups": 2}
    values |= {"bias": False, "dilation": 2, "padding_mode": "circular", "device": "meta", "dtype": torch.float64}
    values |= dict.fromkeys(("in_channels", "in_features"), 4) | dict.fromkeys(("out_channels", "out_features"), 6)
    if "Transpose" in name:
        values["padding_mode"] = "zeros"
    arguments = [values[p] for p in inspect.signature(getattr(nn, name)).parameters]
    ours, theirs = getattr(pws, name)(*arguments), getattr(nn, name)(*arguments)
    for attribute in values.keys() - {"device", "dtype"}:
        assert getattr(ours, attribute, None) == getattr(theirs, attribute, None)
    assert (ours.weight.shape, ours.weight.dtype) == (theirs.weight.shape, torch.float64)


Function = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def padded(function: Function, pad: tuple[int, ...], mode: str) -> Function:
    return lambda x, kernel, bias: function(F.pad(x, pad, mode=mode), kernel, bias)


CASES: dict[str, tuple[str, dict[str, Any], tuple[int, ...], Function]] = {
    "conv1d, groups and dilation": (
        *("Conv1d", {"groups": 2, "dilation": 2}, (2, 4, 9)),
        partial(F.conv1d, groups=2, dilation=2),
    ),
    "conv1d, same": ("Conv1d", {"padding": "same"}, (2, 4, 9), partial(F.conv1d, padding="same")),
    "conv2d, stride": ("Conv2d", {"stride": (2, 1)}, (2, 4, 7, 6), partial(F.conv2d, stride=(2, 1))),
    "conv2d, padding and groups": (
        *("Conv2d", {"padding": (2, 1), "groups": 2}, (2, 4, 5, 6)),
        partial(F.conv2d, padding=(2, 1), groups=2),
    ),
    "conv2d, same and dilation": (
        *("Conv2d", {"padding": "same", "dilation": 2}, (2, 4, 7, 7)),
        partial(F.conv2d, padding="same", dilation=2),
    ),
    "conv2d, valid": ("Conv2d", {"padding": "valid"}, (2, 4, 5, 5), F.conv2d),
    "conv2d, no bias": ("Conv2d", {"bias": False}, (2, 4, 5, 5), F.conv2d),
    "conv2d, unbatched": ("Conv2d", {}, (4, 5, 5), F.conv2d),
    "conv2d, reflect": (
        *("Conv2d", {"padding": (1, 2), "padding_mode": "reflect"}, (2, 4, 5, 5)),
        padded(F.conv2d, (2, 2, 1, 1), "reflect"),
    ),
    "conv2d, replicate": (
        *("Conv2d", {"padding": 1, "padding_mode": "replicate"}, (2, 4, 5, 5)),
        padded(F.conv2d, (1, 1, 1, 1), "replicate"),
    ),
    "conv1d, circular": (
        *("Conv1d", {"padding": 2, "padding_mode": "circular"}, (2, 4, 5)),
        padded(F.conv1d, (2, 2), "circular"),
    ),
    "conv3d, stride and groups": (
        *("Conv3d", {"stride": 2, "groups": 2, "padding": 1}, (2, 4, 4, 5, 4)),
        partial(F.conv3d, stride=2, groups=2, padding=1),
    ),
    "conv3d, unbatched": ("Conv3d", {"relative_gamma": True}, (4, 4, 5, 4), F.conv3d),
    "transpose1d, dilation": (
        *("ConvTranspose1d", {"dilation": 2, "padding": 1}, (2, 4, 5)),
        partial(F.conv_transpose1d, dilation=2, padding=1),
    ),
    "transpose2d, stride and groups": (
        *("ConvTranspose2d", {"stride": 2, "groups": 2, "output_padding": 1}, (2, 4, 4, 5)),
        partial(F.conv_transpose2d, stride=2, groups=2, output_padding=1),
    ),
    "transpose2d, no bias": ("ConvTranspose2d", {"bias": False}, (2, 4, 4, 5), F.conv_transpose2d),
    "transpose2d, unbatched": ("ConvTranspose2d", {}, (4, 4, 5), F.conv_transpose2d),
    "transpose3d, groups": ("ConvTranspose3d", {"groups": 2}, (2, 4, 3, 3, 3), partial(F.conv_transpose3d, groups=2)),
    "linear": ("Linear", {}, (2, 4), F.linear),
    "linear, no bias": ("Linear", {"bias": False}, (2, 3, 4), F.linear),
    "linear, unbatched": ("Linear", {"gamma": 0.1}, (4,), F.linear),
}


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_equal_torch_with_the_reference_kernel(case: str) -> None:
    name, settings, shape, function = CASES[case]
    layer = disturb(build(name, **settings, **GAIN, dtype=torch.float64))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    ours, theirs = layer(x), function(x, reference_kernel(layer), layer.bias)
    assert_close(ours, theirs, "float64")
    leaves, g = [x, *layer.parameters()], torch.randn_like(theirs)
    for mine, expected in zip(grad(ours, leaves, g), grad(theirs, leaves, g), strict=True):
        assert_close(mine, expected, "float64")


@pytest.mark.parametrize("size", [[9, 10], [10, 9], [2, 6, 10, 10]], ids=str)
def test_output_size_of_transposed_convolutions(size: list[int]) -> None:
    layer = disturb(build("ConvTranspose2d", stride=2, dtype=torch.float64, **GAIN))
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    extra = tuple(s - 9 for s in size[-2:])
    expected = F.conv_transpose2d(x, reference_kernel(layer), layer.bias, stride=2, output_padding=extra)
    assert_close(layer(x, output_size=size), expected, "float64")


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", ["ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"])
def test_a_transposed_filter_is_what_makes_one_output_channel(name: str, groups: int) -> None:
    layer = disturb(build(name, groups=groups, dtype=torch.float64))
    x = inputs(layer)
    before = layer(x)
    inputs_a_group, outputs_a_group = 4 // groups, 6 // groups
    for channel in range(6):
        group, j = divmod(channel, outputs_a_group)
        for tensor, entry in (layer.alpha, (channel,)), (layer.weight, (group * inputs_a_group, j)):
            changed = deepcopy(layer)
            next(p for p in changed.parameters() if p.shape == tensor.shape).data[entry].view(-1)[0] += 1
            others = (changed(x) != before).movedim(1, 0).flatten(1).any(1).nonzero().flatten()
            assert others.tolist() == [channel]


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_kernel_sums_to_zero_for_each_output_channel_only(groups: int) -> None:
    layer = disturb(build("ConvTranspose2d", groups=groups, dtype=torch.float64))
    grouped = layer.kernel().unflatten(0, (groups, -1))  # (groups, inputs, outputs, 3, 3)
    assert_close(grouped.sum((1, 3, 4)), torch.zeros(groups, 6 // groups), "float64")
    assert grouped.sum((2, 3, 4)).abs().min() > 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("settings", [{"dtype": torch.float64}, {"device": "meta"}], ids=str)
def test_device_and_dtype_reach_every_parameter(name: str, settings: dict[str, Any]) -> None:
    layer = build(name, **settings)
    expected = (torch.device(settings.get("device", "cpu")), settings.get("dtype", torch.float32))
    assert {(p.device, p.dtype) for p in layer.parameters()} == {expected}
    out = layer(inputs(layer).to(expected[0]))
    assert (out.device, out.dtype) == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_holds_the_parameters_alone(name: str) -> None:
    layer = build(name)
    assert {key: tuple(value.shape) for key, value in layer.state_dict().items()} == {
        **{"weight": tuple(layer.weight.shape), "alpha": (6,), "bias": (6,)}
    }
    assert build(name, bias=False).state_dict().keys() == {"weight", "alpha"}
    layer(inputs(layer))
    layer.eval()(inputs(layer))
    assert not list(layer.buffers())
    assert layer.state_dict().keys() == {"weight", "alpha", "bias"}


def load(layer: nn.Module) -> nn.Module:
    checkpoint = disturb(deepcopy(layer).float()).state_dict()
    layer.load_state_dict(checkpoint)
    assert all(torch.equal(value.float(), checkpoint[key]) for key, value in layer.state_dict().items())
    return layer


def switch(layer: nn.Module) -> nn.Module:
    mode = not layer.training
    assert layer.train(mode) is layer
    assert layer.training is mode
    return layer


STEPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "load": load,
    "switch mode": switch,
    "double": lambda layer: layer.double(),
    "copy": lambda layer: pickle.loads(pickle.dumps(deepcopy(layer))),
}


@pytest.mark.parametrize("order", list(permutations(STEPS)), ids=" - ".join)
def test_the_kernel_is_always_that_of_the_current_weights(order: tuple[str, ...]) -> None:
    for name in ("Conv2d", "ConvTranspose2d"):
        for training in (True, False):
            layer = disturb(build(name)).train(training)
            for step in ("", *order):
                layer = STEPS.get(step, lambda same: same)(layer)
                x = inputs(layer)
                row = "float64" if layer.weight.dtype == torch.float64 else "float32"
                assert_close(layer(x), reference_output(layer, x), row)


@pytest.mark.parametrize("name", NAMES)
def test_casts_and_modes_return_the_layer(name: str) -> None:
    layer = disturb(build(name))
    assert layer.eval() is layer
    assert layer.train() is layer
    half = deepcopy(layer).to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(inputs(half)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_exponential_moving_average(name: str) -> None:
    layer = disturb(build(name, dtype=torch.float64, **GAIN)).eval()
    layer(inputs(layer))
    average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    first = deepcopy(layer)
    average.update_parameters(layer)
    average.update_parameters(disturb(layer))
    for mine, a, b in zip(average.module.parameters(), first.parameters(), layer.parameters(), strict=True):
        assert_close(mine, (a + b) / 2, "float64")
    x = inputs(layer)
    assert_close(average(x), reference_output(average.module, x), "float64")


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_authors_alpha_of_four_dimensions_loads(name: str, assign: bool) -> None:
    source, target = (nn.Sequential(disturb(build(name))) for _ in range(2))
    checkpoint = source.state_dict()
    checkpoint["0.alpha"] = checkpoint["0.alpha"].reshape(6, 1, 1, 1)
    target.load_state_dict(checkpoint, assign=assign)
    assert torch.equal(target[0].alpha, source[0].alpha)
    assert isinstance(target[0].alpha, nn.Parameter)
    assert checkpoint["0.alpha"].shape == (6, 1, 1, 1), "the caller's checkpoint is not ours to change"


def test_an_alpha_of_another_size_does_not_load() -> None:
    layer = build("Conv2d")
    with pytest.raises(RuntimeError, match="size mismatch for alpha"):
        layer.load_state_dict({**layer.state_dict(), "alpha": torch.ones(3, 1, 1, 1)})


@pytest.mark.parametrize("name", NAMES)
def test_export(name: str) -> None:
    layer = disturb(build(name)).eval()
    exported = torch.export.export(layer, (inputs(layer),))
    x = inputs(layer)
    assert_close(exported.module()(x), reference_output(layer, x), "float32")


@pytest.mark.parametrize(("name", "backend"), [("Conv2d", "inductor"), ("ConvTranspose2d", "aot_eager")])
def test_compile(name: str, backend: str) -> None:
    """One through the code generator, the other traced forward and backward only: a code generator takes seconds."""
    torch.compiler.reset()
    layer = disturb(build(name))
    x = inputs(layer)
    ours, theirs = torch.compile(layer, fullgraph=True, backend=backend)(x), reference_output(layer, x)
    assert_close(ours, theirs, "float32")
    leaves, g = list(layer.parameters()), torch.randn_like(ours)
    for mine, expected in zip(grad(ours, leaves, g), grad(theirs, leaves, g.double()), strict=True):
        assert_close(mine, expected, "float32")


@pytest.mark.parametrize(("name", "groups"), [("Conv2d", 2), ("ConvTranspose2d", 2), ("Conv1d", 1), ("Linear", 1)])
def test_per_sample_gradients(name: str, groups: int) -> None:
    layer = disturb(build(name, dtype=torch.float64, **({"groups": groups} if groups > 1 else {})))
    samples = inputs(layer, samples=3)
    parameters = dict(layer.named_parameters())

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(layer, values, (sample[None],)).square().sum()

    together = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, samples)
    for i, sample in enumerate(samples):
        alone = grad(layer(sample[None]).square().sum(), list(parameters.values()))
        for key, expected in zip(parameters, alone, strict=True):
            assert_close(together[key][i], expected, "float64")
    assert not torch.equal(together["weight"][0], together["weight"][1])


class OneLayer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Reference(OneLayer):
    """A layer whose output is the reference's."""

    def forward(self, x: Tensor) -> Tensor:
        return reference_output(self.layer, x)


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_derivatives(name: str) -> None:
    layer = disturb(build(name, dtype=torch.float64, **GAIN))
    x = inputs(layer)
    values = {key: p.detach() for key, p in Reference(layer).named_parameters()}
    tangents = {key: torch.randn_like(value) for key, value in values.items()}

    def along(model: nn.Module) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(lambda v: torch.func.functional_call(model, v, (x,)), (values,), (tangents,))

    for mine, expected in zip(along(OneLayer(layer)), along(Reference(layer)), strict=True):
        assert_close(mine, expected, "float64")


@pytest.mark.parametrize(
    "layer",
    [
        lambda: pws.Conv2d(8, 8, 1, groups=8),
        lambda: pws.Conv1d(1, 8, 1),
        lambda: pws.ConvTranspose2d(8, 8, 1, groups=8),
        lambda: pws.Linear(1, 8),
    ],
    ids=["depthwise 1x1", "1x1 from one channel", "transposed depthwise 1x1", "from one feature"],
)
def test_filters_of_one_entry_are_refused(layer: Callable[[], nn.Module]) -> None:
    with pytest.raises(pws.ShapeError, match=r"fan-in of at least 2; .*\(8, 1.*plain torch.nn layer"):
        layer()


def test_depthwise_3x3_is_not_refused() -> None:
    layer = disturb(pws.Conv2d(4, 4, 3, groups=4, dtype=torch.float64, **GAIN))
    x = inputs(layer)
    assert_close(layer(x), F.conv2d(x, reference_kernel(layer), layer.bias, groups=4), "float64")


@pytest.mark.parametrize(
    ("settings", "message"), [({"gamma": -1.0}, "gamma .* got -1.0"), ({"gain": 0}, "gain .* got 0")]
)
def test_settings_are_checked_when_the_layer_is_built(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(pws.PwsError, match=message):
        build("Conv2d", **settings)


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [
        (lambda: pws.Conv2d(64, 128, 3), 576),
        (lambda: pws.Conv2d(128, 128, 3, groups=2), 576),
        (lambda: pws.ConvTranspose2d(128, 128, 3, groups=2), 576),
        (lambda: pws.ConvTranspose2d(256, 32, 3), 2304),
        (lambda: pws.Linear(576, 128), 576),
    ],
    ids=["conv", "grouped conv", "grouped transposed", "transposed", "linear"],
)
def test_initial_values_and_reset(layer: Callable[[], nn.Module], fan_in: int) -> None:
    built = layer()
    for fresh in (True, False):
        if not fresh:
            disturb(built).reset_parameters()
        assert_close(built.weight.std(), (2 / fan_in) ** 0.5, "initial deviation")
        assert built.weight.mean().abs() < 5 * (2 / fan_in / built.weight.numel()) ** 0.5  # 5 standard errors
        assert torch.equal(built.alpha, torch.ones(len(built.bias)))
        assert torch.equal(built.bias, torch.zeros_like(built.bias))


@pytest.mark.parametrize("name", NAMES)
def test_repr_shows_the_settings(name: str) -> None:
    told = repr(build(name, gamma=0.02, gain="linear"))
    theirs = repr(getattr(nn, name)(4, 6, *([] if name == "Linear" else [3])))
    assert told == f"{theirs[:-1]}, gamma=0.02, gain=1)"
    assert "relative_gamma=True" in repr(build(name, relative_gamma=True))
    assert "gain=1.7129" in repr(build(name))


class WithArguments(pws.Conv2d):
    def __init__(self, channels: int, *, squeeze: bool = False) -> None:
        super().__init__(channels, channels, 3, gamma=0.5)
        self.squeeze = squeeze


class WithoutArguments(pws.Conv2d):
    pass


def test_subclasses_show_their_own_arguments() -> None:
    assert list(inspect.signature(WithArguments).parameters) == ["channels", "squeeze"]
    assert inspect.signature(WithoutArguments) == inspect.signature(pws.Conv2d)
    assert WithArguments(4, squeeze=True).gamma == 0.5
    assert isinstance(WithoutArguments(4, 6, 3), nn.Conv2d)
