"""`pws.diagnose` on models of every sort."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from diagnose_helpers import (
    cross_entropy,
    deterministic,
    images,
    small_net,
    square,
    state,
)
from timm.layers import ScaledStdConv2d, StdConv2d
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

import pws
from pws._mark import mark
from pws.diagnosis import Diagnosis, diagnose


def same(found: Diagnosis, expected: Diagnosis, row: str = "float32") -> None:
    """The numbers of two diagnoses of the same mathematics."""
    assert [layer.name for layer in found.layers] == [layer.name for layer in expected.layers]
    for mine, theirs in zip(found.layers, expected.layers, strict=True):
        assert (mine.calls, mine.positions, mine.kernel_shape) == (theirs.calls, theirs.positions, theirs.kernel_shape)
        for field in (
            "centred",
            "shift",
            "covariance",
            "average_gradient",
            "critical_lr",
            "transmission",
            "update_ratio",
        ):
            assert_close(getattr(mine, field), getattr(theirs, field), row)


def test_an_inplace_relu_behind_a_convolution() -> None:
    model, batch = deterministic(), images()
    expected = diagnose(model, batch, cross_entropy)
    model[2], model[5] = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
    same(diagnose(model, batch, cross_entropy), expected, "exact")


def test_an_inplace_operation_on_the_output_in_front_of_no_norm() -> None:
    """The gradient is that of the layer's own output, as it was before the operation changed it."""
    linear, x = nn.Linear(3, 4), torch.randn(16, 3)
    plain, inplace = (nn.Sequential(linear, nn.ReLU(inplace=flag), nn.Linear(4, 2)) for flag in (False, True))
    inplace[2] = plain[2]
    same(diagnose(inplace, x, square), diagnose(plain, x, square), "exact")


class Residual(nn.Module):
    def __init__(self, conv: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv(1, 4, 3, padding=1), conv(4, 4, 3, padding=1), conv(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x += self.b(torch.relu(self.a(torch.relu(x))))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


@pytest.mark.parametrize("conv", [nn.Conv2d, pws.Conv2d])
def test_a_residual_network(conv: Callable[..., nn.Module]) -> None:
    model, batch = Residual(conv).double(), images()
    batch = (batch[0].double(), batch[1])
    layers = diagnose(model, batch, cross_entropy).layers
    assert [layer.name for layer in layers] == ["stem", "a", "b", "head"]
    # The stem's output also goes round the branch: the gradient by it is the sum, that by a's input is a's alone.
    stem = model.stem(batch[0])
    inner = torch.relu(stem)
    outer = stem + model.b(torch.relu(model.a(inner)))
    value = cross_entropy(model.head(outer.mean((2, 3))), batch[1])
    whole, before_a = torch.autograd.grad(value, [stem, inner])
    assert_close(layers[0].gradient.second_moment, whole.square().mean(), "float64")
    assert_close(
        layers[1].gradient_transmission * layers[1].gradient.second_moment, before_a.square().mean(), "float64"
    )


def test_the_gradient_through_one_layer_alone() -> None:
    """An input that two layers share: each layer's part, not the sum."""

    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            y: Tensor = self.a(h) + self.b(h)
            return y

    model, x = Parallel().double(), torch.randn(8, 3, dtype=torch.float64)
    layers = diagnose(model, x, square).layers
    delta = 2 * model(x) / 16
    for layer, module in zip(layers[1:], (model.a, model.b), strict=True):
        through = delta @ module.weight
        assert_close(layer.gradient_transmission, through.square().mean() / delta.square().mean(), "float64")


def test_autocast_to_bfloat16() -> None:
    model, batch = small_net(pws.Conv2d, nn.Linear), images(32)
    torch.manual_seed(2)
    expected = diagnose(model, batch, cross_entropy)
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16):
        found = diagnose(model, batch, cross_entropy)
        assert torch.is_autocast_enabled("cpu")
    for layer in found.layers[:2]:
        assert layer.critical_lr == math.inf
        assert layer.shift_share < 1e-4  # of a kernel rounded to 8 bits
    assert found.layers[2].critical_lr == pytest.approx(expected.layers[2].critical_lr, rel=0.05)
    for layer, wide in zip(found.layers, expected.layers, strict=True):
        assert layer.finite
        total = layer.centred + layer.shift + layer.covariance
        assert total == pytest.approx(layer.output.variance, rel=0.02)
        assert layer.output.variance == pytest.approx(wide.output.variance, rel=0.05)
        assert layer.average_gradient == pytest.approx(wide.average_gradient, rel=0.1)
    json.dumps(found.to_dict(filters=True), allow_nan=False)


def test_critical_rates_of_a_plain_network_under_autocast() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
    )
    batch = images(32)
    expected = [layer.critical_lr for layer in diagnose(model, batch, cross_entropy).layers]
    with torch.autocast("cpu", torch.bfloat16):
        found = [layer.critical_lr for layer in diagnose(model, batch, cross_entropy).layers]
    assert found == pytest.approx(expected, rel=0.05)
    assert found != expected


@pytest.mark.parametrize("conv", [pws.Conv2d, StdConv2d, ScaledStdConv2d], ids=lambda conv: conv.__name__)
@pytest.mark.parametrize("precision", ["float32", "float64", "autocast", "bfloat16"])
def test_no_step_shifts_a_standardized_filter_in_any_precision(conv: Callable[..., nn.Module], precision: str) -> None:
    """Rounding alone leaves a step a mean; at a width of 64 as at one of 1."""
    model = nn.Sequential(
        conv(1, 32, 3), nn.ReLU(), conv(32, 64, 3), nn.ReLU(), conv(64, 8, 3), nn.ReLU(), nn.Flatten()
    )
    x, target = images(16)
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(precision, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        diagnosis = diagnose(model.to(dtype), (x.to(dtype), target), lambda out, t: cross_entropy(out.float(), t))
    assert [layer.critical_lr for layer in diagnosis.layers] == [math.inf] * 3
    assert all(layer.average_gradient > 0 for layer in diagnosis.layers)
    assert diagnosis.critical_lr == math.inf
    assert diagnosis.critical_layer is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision(dtype: torch.dtype) -> None:
    model, (x, target) = deterministic(), images(16)
    expected = diagnose(model, (x, target), cross_entropy)
    found = diagnose(model.to(dtype), (x.to(dtype), target), lambda out, t: cross_entropy(out.float(), t))
    for layer, wide in zip(found.layers, expected.layers, strict=True):
        assert layer.finite
        assert layer.output.variance == pytest.approx(wide.output.variance, rel=0.05)
        assert layer.critical_lr == pytest.approx(wide.critical_lr, rel=0.1)
        total = layer.centred + layer.shift + layer.covariance
        assert total == pytest.approx(layer.output.variance, rel=0.02)


def test_a_compiled_model() -> None:
    torch.compiler.reset()
    model, batch = deterministic(), images()
    expected = diagnose(model, batch, cross_entropy)
    compiled = torch.compile(model, backend="eager")
    same(diagnose(compiled, batch, cross_entropy), expected)
    compiled(batch[0])
    before = state(model)
    same(diagnose(compiled, batch, cross_entropy), expected)
    assert state(model) == before
    model.compile(backend="eager")
    same(diagnose(model, batch, cross_entropy), expected)
    inner = nn.Sequential(torch.compile(model[0], backend="eager"), *model[1:])
    inner(batch[0])
    assert [layer.fan_in for layer in diagnose(inner, batch, cross_entropy).layers] == [9, 36, 96]


class Checkpointed(nn.Module):
    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.net[:4], x, use_reentrant=False)
        y: Tensor = self.net[4:](x)
        return y


def test_checkpointed_blocks() -> None:
    """The block runs again in the backward pass; it counts once, and leaves nothing behind."""
    model, batch = deterministic(), images()
    expected = diagnose(model, batch, cross_entropy)
    wrapped = Checkpointed(model)
    before = state(wrapped)
    found = diagnose(wrapped, batch, cross_entropy)
    assert state(wrapped) == before
    assert [layer.calls for layer in found.layers] == [1, 1, 1]
    for mine, theirs in zip(found.layers, expected.layers, strict=True):
        assert mine.name == f"net.{theirs.name}"
        assert_close(mine.average_gradient, theirs.average_gradient, "float32")
        assert_close(mine.critical_lr, theirs.critical_lr, "float32")


def test_a_data_parallel_wrapper() -> None:
    model, batch = deterministic(), images()
    same(diagnose(nn.DataParallel(model), batch, cross_entropy), diagnose(model, batch, cross_entropy))


def test_a_layer_that_is_the_model() -> None:
    for layer, kind in (
        (nn.Linear(3, 2), "Linear"),
        (pws.Linear(3, 2), "Linear, pws"),
        (mark(nn.Linear(3, 2)), "Linear, pws"),
        (nn.Linear(3, 2, bias=False), "Linear"),
    ):
        diagnosis = diagnose(layer, torch.randn(8, 3), square)
        assert [(found.name, found.kind) for found in diagnosis.layers] == [("Linear", kind)]
        assert diagnosis.unused == ()
        assert diagnosis.model == "Linear"


class OwnConvolutions(nn.Module):
    """Convolves by functions, with parameters of its own, by position and by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(0.3 * torch.randn(4, 1, 3, 3))
        self.second = nn.Parameter(0.3 * torch.randn(2, 2, 3, 3))
        self.bias = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(F.conv2d(x, self.first, None, 1, 1))
        return F.conv2d(input=x, weight=self.second, bias=self.bias, padding=0, groups=2)


def test_functional_convolutions_with_a_models_own_parameters() -> None:
    model, x = OwnConvolutions().double(), images()[0].double()
    layers = diagnose(model, x, square).layers
    assert [layer.name for layer in layers] == ["OwnConvolutions", "OwnConvolutions (2)"]
    assert [layer.groups for layer in layers] == [1, 2]
    assert [layer.fan_in for layer in layers] == [9, 18]
    square(model(x)).backward()
    for layer, weight in zip(layers, (model.first, model.second), strict=True):
        assert_close(layer.filters.average_step, weight.grad.flatten(1).mean(1), "float64")


def test_a_transformer_block() -> None:
    for training in (True, False):
        model = nn.Sequential(nn.Linear(6, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2))
        model.train(training)
        names = [layer.name for layer in diagnose(model, torch.randn(4, 5, 6), square).layers]
        assert names[0] == "0"
        assert names[-3:] == ["1.linear1", "1.linear2", "2"]


def test_multihead_attention() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.attention(x, x, x)[0])
            return y

    diagnosis = diagnose(Attends(), torch.randn(4, 5, 8), square)
    assert diagnosis.layers[-1].name == "head"
    assert all(math.isfinite(layer.centred) for layer in diagnosis.layers)
    assert all(layer.critical_lr > 0 for layer in diagnosis.layers if layer.critical_lr is not None)
    assert diagnosis.unused == (), "the attention's projections ran"


def test_spectral_norm() -> None:
    model = nn.Sequential(spectral_norm(nn.Conv2d(1, 4, 3)), nn.ReLU(), nn.Flatten(), spectral_norm(nn.Linear(144, 5)))
    batch, before = images(), state(model)
    diagnosis = diagnose(model, batch, cross_entropy)
    assert state(model) == before, "the power iteration moves buffers"
    assert [(layer.name, layer.kind) for layer in diagnosis.layers] == [("0", "Conv2d"), ("3", "Linear")]
    # The kernel's norm does not matter to a scale of the parameter: no step grows along the weight itself.
    assert all(layer.update_ratio > 0 for layer in diagnosis.layers)
    assert all(0 < layer.critical_lr < math.inf for layer in diagnosis.layers)


def test_a_recurrent_network_is_refused_or_reported() -> None:
    """An LSTM's own operation is none of ours: it is no layer, and breaks nothing."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.lstm(x)[0][:, -1])
            return y

    assert [layer.name for layer in diagnose(Recurrent(), torch.randn(4, 5, 3), square).layers] == ["head"]


def test_an_output_size_for_a_transposed_convolution() -> None:
    class Upscale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.up(x, output_size=(10, 9))
            return y

    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    (layer,) = diagnose(Upscale(), x, square).layers
    assert layer.positions == 180
    assert_close(layer.centred + layer.shift + layer.covariance, layer.output.variance, "float64")


def test_the_input_may_want_a_gradient() -> None:
    x = torch.randn(8, 3, requires_grad=True)
    y = x * 2
    for given in (x, y):
        (layer,) = diagnose(nn.Linear(3, 2), given, square).layers
        assert layer.gradient is not None
        assert not given._backward_hooks
    assert x.grad is None
    y.sum().backward()
    assert_close(x.grad, torch.full((8, 3), 2.0), "exact")


def test_a_single_sample_without_a_batch_in_front_of_a_linear_layer() -> None:
    """One position: no variance over positions, and the average gradient is all expectation."""
    model, x = nn.Linear(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64) + 1
    (single,) = diagnose(model, x, square).layers
    (batch,) = diagnose(model, x[None], square).layers
    assert (single.positions, single.output.variance, single.centred) == (1, 0, 0)
    same_filters = zip(vars(single.filters).values(), vars(batch.filters).values(), strict=True)
    for mine, theirs in same_filters:
        assert_close(mine, theirs, "float64")
