"""`pws.diagnose` on models of every sort: what it leaves behind, what it finds, what it refuses."""

from __future__ import annotations

import io
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from timm.layers import ScaledStdConv2d, StdConv2d
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

import pws
from pws._errors import PwsError
from pws._mark import mark
from pws.diagnosis import Diagnosis, diagnose

cross_entropy = nn.functional.cross_entropy


def small_net(conv: Callable[..., nn.Module] = nn.Conv2d, head: Callable[..., nn.Module] = nn.Linear) -> nn.Sequential:
    return nn.Sequential(
        *(conv(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)),
        *(conv(4, 6, 3), nn.ReLU(), nn.Flatten(), head(96, 5)),
    )


def images(samples: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 1, 8, 8) + 0.5, torch.arange(samples) % 5


def square(outputs: Tensor) -> Tensor:
    return outputs.square().mean()


# --- Nothing is left behind ---


def hooks(model: nn.Module) -> list[int]:
    """How many hooks of each kind every module and parameter has."""
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks_always_called",
    )
    kinds += ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    of_modules = [len(getattr(module, kind)) for module in model.modules() for kind in kinds]
    return of_modules + [
        len(p._backward_hooks or ()) + len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()
    ]


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that a diagnosis must not change, to compare with `==`."""
    return {
        "parameters": [(id(p), p._version, p.tolist(), p.requires_grad) for p in model.parameters()],
        "gradients": [(id(p.grad), None if p.grad is None else p.grad.tolist()) for p in model.parameters()],
        "buffers": {name: (id(b), b.tolist()) for name, b in model.named_buffers()},
        "modes": [module.training for module in model.modules()],
        "hooks": hooks(model),
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "random": (random.getstate(), torch.get_rng_state().tolist(), str(np.random.get_state())),
        "modes of torch": (
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.overrides._get_current_function_mode(),
        ),
    }


class Noisy(nn.Module):
    """Uses every generator, counts in a buffer that it replaces, and fails on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()
        self.fail: BaseException | None = None
        self.register_buffer("count", torch.zeros(3))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + random.random() + float(np.random.rand())
        y: Tensor = self.net(x + 0.01 * torch.randn_like(x))
        if self.fail is not None:
            raise self.fail
        return y


def prepared(gradients: bool) -> Noisy:
    """In mixed modes, with gradients or only some of them, and hooks of the user's."""
    model = Noisy()
    model.net[3].eval()
    if gradients:
        model(images()[0]).square().mean().backward()
        model.net[4].weight.grad = None
    model.net[0].register_forward_hook(lambda *_: None)
    model.net[0].weight.register_hook(lambda _: None)
    return model


@pytest.mark.parametrize("gradients", [False, True], ids=["no gradients", "gradients"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_model_is_left_as_it_was(gradients: bool, training: bool) -> None:
    model = prepared(gradients)
    if not training:
        model.eval()
        model.net[1].train()
    batch, before = images(), state(model)
    inputs = batch[0].clone()
    diagnosis = diagnose(model, batch, cross_entropy)
    assert len(diagnosis.layers) == 3
    assert state(model) == before
    assert diagnosis.settings.training is training
    assert torch.equal(batch[0], inputs)
    assert batch[0].grad is None


def test_a_diagnosis_needs_no_gradient_mode() -> None:
    model = small_net()
    torch.manual_seed(1)
    expected = diagnose(model, images(), cross_entropy).layers[0].average_gradient
    torch.manual_seed(1)
    with torch.no_grad():
        found = diagnose(model, images(), cross_entropy).layers[0].average_gradient
        assert not torch.is_grad_enabled()
    assert found == expected


def failing_loss(error: BaseException) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(*_: Tensor) -> Tensor:
        raise error

    return loss


@pytest.mark.parametrize(
    ("where", "error", "told"),
    [
        ("model", RuntimeError("boom"), PwsError),
        ("model", KeyboardInterrupt(), KeyboardInterrupt),
        ("model", ZeroDivisionError("boom"), ZeroDivisionError),
        ("loss", RuntimeError("boom"), PwsError),
        ("loss", KeyboardInterrupt(), KeyboardInterrupt),
        ("loss", AssertionError("boom"), PwsError),
        ("backward", RuntimeError("boom"), PwsError),
        ("backward", KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__),
)
def test_the_model_is_left_as_it_was_after_an_error(
    where: str, error: BaseException, told: type[BaseException]
) -> None:
    model, loss = prepared(True), cross_entropy
    if where == "model":
        model.fail = error
    elif where == "loss":
        loss = failing_loss(error)
    else:

        def loss(outputs: Tensor, targets: Tensor) -> Tensor:
            outputs.register_hook(failing_loss(error))
            return cross_entropy(outputs, targets)

    batch, before = images(), state(model)
    with pytest.raises(told, match="boom" if error.args else None):
        diagnose(model, batch, loss)
    assert state(model) == before


def train(model: nn.Module, diagnosed: bool) -> list[Tensor]:
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(4):
        batch = images()
        if diagnosed:
            diagnose(model, (batch[0] * 3, batch[1]), cross_entropy)
        optimizer.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).backward()
        if diagnosed:
            diagnose(model, batch, cross_entropy)
        optimizer.step()
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("conv", [nn.Conv2d, pws.Conv2d, lambda *a: weight_norm(nn.Conv2d(*a))])
def test_training_is_bitwise_the_same(conv: Callable[..., nn.Module]) -> None:
    model = small_net(conv)
    initial = [p.clone() for p in model.parameters()]
    copy = deepcopy(model)
    ours, theirs = train(model, True), train(copy, False)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(initial, ours[: len(initial)], strict=True) if a.dim() > 1)


@pytest.mark.parametrize("training", [True, False])
def test_a_pending_graph_still_backpropagates(training: bool) -> None:
    model = small_net().train(training)
    expected, copy = images(), deepcopy(model)
    torch.manual_seed(5)
    pending = cross_entropy(model(expected[0]), expected[1])
    torch.manual_seed(5)
    cross_entropy(copy(expected[0]), expected[1]).backward()
    diagnose(model, images(), cross_entropy)
    pending.backward()
    for mine, theirs in zip(model.parameters(), copy.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_two_diagnoses_are_the_same() -> None:
    model, batch = small_net(), images()
    first, second = (diagnose(model, batch, cross_entropy).to_dict(filters=True) for _ in range(2))
    assert first == second
    assert first["loss"] > 0


# --- Which layers, in which order, called how often ---


def test_layers_come_in_execution_order() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.middle, self.first = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.middle(self.first(x)))
            return y

    layers = diagnose(Backwards(), torch.randn(8, 3), square).layers
    assert [layer.name for layer in layers] == ["first", "middle", "last"]
    assert layers[2].transmission_product == math.prod(layer.transmission for layer in layers)


class Repeated(nn.Module):
    def __init__(self, times: int) -> None:
        super().__init__()
        self.layer, self.times = nn.Linear(4, 4), times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = torch.relu(self.layer(x))
        return x


@pytest.mark.parametrize("times", [1, 2, 5])
def test_the_calls_of_a_layer_are_pooled(times: int) -> None:
    model, x = Repeated(times).double(), torch.randn(8, 4, dtype=torch.float64) + 1
    diagnosis = diagnose(model, x, square)
    assert len(diagnosis.layers) == 1
    layer = diagnosis.layers[0]
    assert (layer.name, layer.calls, layer.positions) == ("layer", times, 8 * times)
    square(model(x)).backward()
    assert_close(layer.filters.average_gradient, model.layer.weight.grad.mean(1), "float64")
    assert_close(layer.filters.average_step, model.layer.weight.grad.mean(1), "float64")
    seen = [x]
    for _ in range(times - 1):
        seen.append(torch.relu(model.layer(seen[-1])))
    pooled = torch.cat(seen)
    assert_close(layer.input.variance, pooled.var(0, correction=0).mean(), "float64")
    assert_close(layer.output.variance, model.layer(pooled).var(0, correction=0).mean(), "float64")
    assert_close(layer.filters.patch_variance, pooled.mean(1).var(correction=0).expand(4), "float64")


def test_a_tied_parameter_in_two_modules() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    x = torch.randn(8, 4, dtype=torch.float64)
    layers = diagnose(model, x, square).layers
    assert [layer.name for layer in layers] == ["0", "2"]
    square(model(x)).backward()
    # Each use has an average gradient of its own; the step that moves both is that of their sum.
    total = layers[0].filters.average_gradient + layers[1].filters.average_gradient
    assert_close(total, model[0].weight.grad.mean(1), "float64")
    for layer in layers:
        assert_close(layer.filters.average_step, total, "float64")
        assert_close(
            layer.filters.expectation_part + layer.filters.covariance_part, layer.filters.average_gradient, "float64"
        )
    assert not torch.equal(layers[0].filters.average_gradient, layers[1].filters.average_gradient)


def test_unused_layers_are_listed() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.also = nn.Linear(3, 3), pws.Linear(3, 3), nn.ConvTranspose2d(1, 1, 3)
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.used(x)
            return y

    diagnosis = diagnose(Partly(), torch.randn(8, 3), square)
    assert [layer.name for layer in diagnosis.layers] == ["used"]
    assert diagnosis.unused == ("unused", "also")


def test_frozen_layers_are_noted() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    layers = diagnose(model, torch.randn(8, 4), square).layers
    first, second, third = layers
    # No gradient reaches the first layer: nothing in front of it is trained.
    assert first.note == "no gradient reached its output"
    assert (first.critical_lr, first.average_gradient, first.gradient, first.update_ratio) == (None,) * 4
    assert second.note == "its kernel is not trained"
    assert second.gradient is not None
    assert (second.critical_lr, second.average_gradient_ratio) == (None, None)
    assert third.note == ""
    assert third.critical_lr is not None
    assert third.gradient_transmission is not None
    assert all(layer.transmission > 0 for layer in layers)


def test_a_layer_behind_a_detach_is_noted() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(x).detach() + self.b(x)
            return y

    a, b = diagnose(Branches(), torch.randn(8, 4), square).layers
    assert a.note == "no gradient reached its output"
    assert a.critical_lr is None
    assert b.note == ""


def test_a_layer_run_without_gradients_in_part() -> None:
    """A teacher under no_grad next to its student."""

    class Distilled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                target = self.teacher(x)
            y: Tensor = self.student(x) - target
            return y

    model = Distilled()
    layers = {layer.name: layer for layer in diagnose(model, torch.randn(8, 4), square).layers}
    assert not any(hooks(model))
    assert layers["teacher"].critical_lr is None
    assert layers["teacher"].note
    assert layers["student"].critical_lr > 0


@pytest.mark.parametrize("frozen_call", ["first", "last"])
def test_a_layer_called_with_and_without_gradients(frozen_call: str) -> None:
    """A network that is its own target: the order of the two calls does not matter to the step."""

    class SelfDistilled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            if frozen_call == "last":
                y: Tensor = self.layer(x)
            with torch.no_grad():
                target = self.layer(x)
            return (self.layer(x) if frozen_call == "first" else y) - 0.5 * target

    model, x = SelfDistilled(), torch.randn(8, 4, dtype=torch.float64) + 1
    (layer,) = diagnose(model, x, square).layers
    square(model(x)).backward()
    assert (layer.calls, layer.note) == (2, "")
    assert_close(layer.filters.average_step, model.layer.weight.grad.mean(1), "float64")
    assert layer.critical_lr > 0


def test_a_kernel_that_another_module_holds() -> None:
    """A decoder tied to its encoder's weight, which it does not register."""

    class Tied(nn.Module):
        def __init__(self, encoder: nn.Linear) -> None:
            super().__init__()
            self.encoder = [encoder]

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.encoder[0].weight.t())

    encoder = nn.Linear(4, 3, dtype=torch.float64)
    model, x = nn.Sequential(encoder, Tied(encoder)), torch.randn(8, 4, dtype=torch.float64)
    layers = diagnose(model, x, square).layers
    assert [layer.name for layer in layers] == ["0", "1"]
    square(model(x)).backward()
    assert [layer.note for layer in layers] == ["", ""]
    assert_close(layers[0].filters.average_step, encoder.weight.grad.mean(1), "float64")
    assert_close(layers[1].filters.average_step, encoder.weight.grad.mean(0), "float64")


# --- How a batch is given ---


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(4, 2)

    def forward(self, image: Tensor, mask: Tensor, *, flag: bool = False) -> dict[str, Tensor]:
        return {"out": self.a(image) + self.b(mask), "extra": mask}


def test_tuples_and_dicts_of_inputs_and_dicts_of_outputs() -> None:
    model, image, mask, target = TwoInputs(), torch.randn(8, 3), torch.randn(8, 4), torch.randn(8, 2)

    def loss(outputs: dict[str, Tensor], target: Tensor) -> Tensor:
        return F.mse_loss(outputs["out"], target)

    told = [
        diagnose(model, batch, loss).to_dict()
        for batch in (
            ((image, mask), target),
            [[image, mask], target],
            ({"image": image, "mask": mask}, target),
            ({"mask": mask, "image": image, "flag": True}, target),
        )
    ]
    assert told[0]["loss"] == pytest.approx(float(loss(model(image, mask), target)))
    assert told[1:] == told[:1] * 3
    alone = diagnose(model, {"image": image, "mask": mask}, lambda outputs: outputs["out"].square().mean())
    assert [layer.name for layer in alone.layers] == ["a", "b"]
    assert diagnose(model, ((image, mask),), lambda outputs: outputs["out"].square().mean()).loss == alone.loss


def test_targets_may_be_anything_the_loss_takes() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    found = diagnose(model, (x, {"scale": 2.0}), lambda out, target: target["scale"] * out.square().mean())
    assert found.loss == pytest.approx(2 * float(square(model(x))))
    assert diagnose(model, (x, None), lambda out, none: square(out) if none is None else out).loss is not None


# --- Models of every sort ---


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


def deterministic() -> nn.Sequential:
    model = small_net()
    model[3] = nn.Identity()
    return model


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


# --- Bad input ---


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2))


class NoGrad(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(3, 2), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "detach":
            return self.layer(x).detach()
        with torch.no_grad() if self.how == "no_grad" else torch.inference_mode():
            return self.layer(x)


class Asserts(nn.Module):
    """As timm's vision transformers check the size of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 3, f"Input height ({x.shape[1]}) doesn't match model (3)."
        y: Tensor = self.layer(x)
        return y


def bad_input(value: float) -> Tensor:
    x = torch.randn(8, 3)
    x[2, 1] = value
    return x


X = torch.ones(8, 3)
BAD: dict[str, tuple[Callable[[], nn.Module], Any, Callable[..., Any], dict[str, Any], str]] = {
    "no layers": (
        lambda: nn.Sequential(nn.ReLU(), nn.Flatten()),
        X,
        square,
        {},
        r"layer with a weight.*holds Flatten, ReLU",
    ),
    "an empty model": (nn.Sequential, X, square, {}, "layer with a weight.*holds nothing|holds Sequential"),
    "norms alone": (lambda: nn.BatchNorm1d(3), X, square, {}, r"layer with a weight.*BatchNorm1d"),
    "a wrong shape": (linear, torch.ones(8, 4), square, {}, "rejects the batch: RuntimeError.*shapes"),
    "a wrong dtype": (
        linear,
        torch.ones(8, 3, dtype=torch.int64),
        square,
        {},
        "rejects the batch: RuntimeError.*dtype",
    ),
    "a shape the model asserts": (
        Asserts,
        torch.ones(8, 4),
        square,
        {},
        "rejects the batch: AssertionError: Input height",
    ),
    "too many inputs": (linear, ((X, X), X), F.mse_loss, {}, "rejects the batch: TypeError"),
    "unknown names": (linear, ({"image": X}, X), F.mse_loss, {}, "rejects the batch: TypeError.*image"),
    "an array": (linear, np.ones((8, 3)), square, {}, r"a batch is \(inputs, targets\).*got ndarray"),
    "an array in a pair": (linear, (np.ones((8, 3)), X), F.mse_loss, {}, "ndarray"),
    "a string": (linear, "batch", square, {}, r"a batch is .*got str"),
    "none": (linear, None, square, {}, r"a batch is .*got NoneType"),
    "a triple": (linear, (X, X, X), square, {}, r"a batch is .*tuple of 3.*\(\(image, mask\), target\)"),
    "nothing": (linear, (), square, {}, r"a batch is .*tuple of 0"),
    "a loss with shape": (linear, X, lambda out: out, {}, r"scalar.*\(8, 2\).*mean"),
    "a loss that is a number": (linear, X, lambda out: float(out.mean()), {}, "scalar tensor; got a float"),
    "no loss": (linear, X, lambda out: None, {}, "scalar tensor; got a NoneType"),
    "a loss of the input": (linear, X, lambda out: X.sum(), {}, "must depend on the model's parameters"),
    "a loss of something else": (
        *(linear, X, lambda out: torch.ones((), requires_grad=True) * 2, {}),
        "must depend on the model's parameters.*none of them",
    ),
    "detached": (lambda: NoGrad("detach"), X, square, {}, "must depend on the model's parameters.*detaches"),
    "no_grad": (lambda: NoGrad("no_grad"), X, square, {}, "must depend on the model's parameters.*no_grad"),
    "inference_mode": (lambda: NoGrad("inference"), X, square, {}, "must depend on the model's parameters"),
    "frozen": (lambda: linear().requires_grad_(False), X, square, {}, "must depend on the model's parameters.*frozen"),
    "nan": (linear, bad_input(math.nan), square, {}, r"input must be finite; got 1 .*of 24 .*\(8, 3\)"),
    "infinity": (linear, (bad_input(math.inf), X), square, {}, "input must be finite"),
    "nan in a dict": (
        TwoInputs,
        {"image": bad_input(math.nan), "mask": torch.ones(8, 4)},
        square,
        {},
        "input must be finite",
    ),
    "targets missing": (linear, X, cross_entropy, {}, r"loss\(outputs\).*no targets.*TypeError.*target"),
    "wrong targets": (
        linear,
        (X, torch.ones(3)),
        cross_entropy,
        {},
        r"loss\(outputs, targets\).*\(8, 2\).*targets.*\(3,\)",
    ),
    "targets out of range": (
        linear,
        (X, torch.full((8,), 7)),
        cross_entropy,
        {},
        r"loss\(outputs, targets\).*IndexError",
    ),
    "lr 0": (linear, X, square, {"lr": 0.0}, "lr must be positive and finite; got 0.0"),
    "lr negative": (linear, X, square, {"lr": -0.1}, "lr must be positive"),
    "lr nan": (linear, X, square, {"lr": math.nan}, "lr must be positive and finite; got nan"),
    "lr infinite": (linear, X, square, {"lr": math.inf}, "lr must be positive and finite"),
    "momentum 1": (linear, X, square, {"lr": 0.1, "momentum": 1.0}, "momentum .*below 1; got 1.0"),
    "momentum negative": (linear, X, square, {"momentum": -0.1}, "momentum must be at least 0"),
    "momentum nan": (linear, X, square, {"momentum": math.nan}, "momentum .*got nan"),
    "steps 0": (linear, X, square, {"steps": 0}, "steps must be a whole number, at least 1; got 0"),
    "steps of a half": (linear, X, square, {"lr": 0.1, "steps": 1.5}, "steps must be .*1.5"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(2)), X, square, {}, "must be initialized; '0.weight'.*lazy"),
    "meta": (lambda: linear().to("meta"), X, square, {}, "rejects the batch|meta"),
    "an empty batch": (linear, torch.ones(0, 3), square, {}, "empty|no entries|at least one"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(case: str) -> None:
    build, batch, loss, arguments, message = BAD[case]
    model = build()
    before = None if case in ("lazy", "meta") else state(model)
    with pytest.raises(PwsError, match=message) as caught:
        diagnose(model, batch, loss, **arguments)
    text = str(caught.value)
    assert "\n" not in text
    assert text.rstrip().endswith((".", "?", ")"))
    assert before is None or state(model) == before


def test_a_lazy_model_that_has_run_is_diagnosed() -> None:
    model = nn.Sequential(nn.LazyLinear(2))
    model(X)
    assert len(diagnose(model, X, square).layers) == 1


# --- What is not finite ---


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 4, 7])
def test_weights_that_are_not_finite(where: int, value: float) -> None:
    model = deterministic()
    with torch.no_grad():
        model[where].weight.view(-1)[0] = value
    before = hooks(model)
    diagnosis = diagnose(model, images(), cross_entropy, lr=0.1, momentum=0.9, steps=10)
    assert [layer.name for layer in diagnosis.layers] == ["0", "4", "7"]
    first = [layer.name for layer in diagnosis.layers].index(str(where))
    assert [layer.finite for layer in diagnosis.layers] == [i < first for i in range(3)]
    assert [layer.finite_kernel for layer in diagnosis.layers] == [i != first for i in range(3)]
    json.dumps(diagnosis.to_dict(filters=True), allow_nan=False)
    assert rendered(diagnosis)
    assert repr(diagnosis)
    assert (diagnosis.verdict.cause, diagnosis.verdict.layer) == ("non-finite weight", str(where))
    assert hooks(model) == before


def test_a_backward_pass_that_is_not_finite() -> None:
    """A finite loss with an infinite gradient: the root at 0."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.zero_()
    diagnosis = diagnose(model, torch.randn(8, 3), lambda out: out.abs().sqrt().sum(), lr=0.1)
    assert diagnosis.loss == 0
    assert all(layer.finite for layer in diagnosis.layers)
    for layer in diagnosis.layers:  # unknown, which is neither infinite (no step shifts a filter) nor 0
        assert not layer.gradient.second_moment < math.inf
        assert layer.critical_lr is None or math.isnan(layer.critical_lr)
        assert layer.predicted_shift_share(0.1) is None or math.isnan(layer.predicted_shift_share(0.1))
    json.dumps(diagnosis.to_dict(filters=True), allow_nan=False)
    assert rendered(diagnosis)
    assert str(diagnosis.verdict)


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e20, 1e25])
def test_signals_whose_squares_leave_float32(scale: float) -> None:
    """A vanishing or exploding network, as finite as its float64 twin: squares of finite numbers may not overflow."""
    model, x = nn.Linear(8, 4), torch.randn(16, 8)
    with torch.no_grad():
        model.weight *= scale
        model.bias *= scale

    def loss(outputs: Tensor) -> Tensor:
        return (outputs * scale**-1).square().mean() * scale**-1

    found = diagnose(model, x, lambda out: (out / scale).square().mean()).layers[0]
    wide = diagnose(deepcopy(model).double(), x.double(), lambda out: (out / scale).square().mean()).layers[0]
    assert found.finite
    assert found.finite_kernel
    for field in ("transmission", "centred", "shift", "covariance", "average_gradient", "update_ratio", "critical_lr"):
        value, expected = getattr(found, field), getattr(wide, field)
        assert value == pytest.approx(expected, rel=1e-4), field
    assert found.gradient.second_moment == pytest.approx(wide.gradient.second_moment, rel=1e-4)


@pytest.mark.parametrize("where", [1, 2, 3])
def test_a_layer_whose_output_is_constant(where: int) -> None:
    """A zero-initialized layer, as the last one of a residual branch: there is a verdict, and no division by zero."""
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)))
    with torch.no_grad():
        model[where].weight.zero_()
        model[4].weight *= 1e4
    diagnosis = diagnose(model, torch.randn(8, 6), square, lr=0.1, momentum=0.9, steps=3)
    assert diagnosis.layers[where].output.variance == 0
    assert diagnosis.layers[where].transmission == 0
    json.dumps(diagnosis.to_dict(), allow_nan=False)
    assert rendered(diagnosis)
    assert str(diagnosis.verdict)


def test_a_constant_gradient_has_no_negative_variance() -> None:
    """The same delta at every position: its variance is 0, in float32 too."""
    torch.manual_seed(0)
    for samples in (1, 3, 7, 100):
        model = nn.Conv2d(2, 3, 3)
        (layer,) = diagnose(model, torch.randn(samples, 2, 9, 9), lambda out: 0.1 * out.mean()).layers
        assert 0 <= layer.gradient.variance <= 1e-12 * layer.gradient.second_moment
        assert layer.gradient.total_variance >= 0


# --- How it is shown ---


def rendered(diagnosis: Diagnosis, width: int = 250) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(diagnosis.table())
    return file.getvalue()


def test_the_table_has_a_row_a_layer_and_the_numbers() -> None:
    diagnosis = diagnose(small_net(), images(), cross_entropy, lr=0.25)
    text, lines = rendered(diagnosis), list[str]()
    for layer in diagnosis.layers:
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [layer.name]]
        lines.append(line)
        assert f"{layer.output.variance:.3g}" in line
        assert f"{layer.critical_lr:.3g}" in line
        assert f"{100 * layer.shift_share:.0f} %" in line
    shares = [f"{100 * share:.0f} %" for share in diagnosis.predicted_shift_shares()]
    assert [line.rstrip().endswith(share) for line, share in zip(lines, shares, strict=True)] == [True] * 3
    assert rendered(diagnosis, width=40)


def test_a_name_like_markup_is_shown_as_it_is() -> None:
    model = nn.Sequential()
    model.add_module("[red]a[/red]", nn.Linear(3, 2))
    assert "[red]a[/red]" in rendered(diagnose(model, X, square))
    model = nn.Sequential()
    model.add_module("[/b]", nn.Linear(3, 2))
    assert "[/b]" in rendered(diagnose(model, X, square))


def test_repr_and_dict() -> None:
    model = deterministic()
    model[0].requires_grad_(False)
    diagnosis = diagnose(model, images(), cross_entropy, lr=0.2, momentum=0.9, steps=3)
    told = json.loads(json.dumps(diagnosis.to_dict(), allow_nan=False))
    assert (told["model"], told["lr"], told["momentum"], told["steps"]) == ("Sequential", 0.2, 0.9, 3)
    assert told["loss"] == diagnosis.loss
    assert [layer["name"] for layer in told["layers"]] == ["0", "4", "7"]
    for layer, entry in zip(diagnosis.layers, told["layers"], strict=True):
        assert entry["critical_lr"] == layer.critical_lr
        assert entry["shift_share"] == layer.shift_share
        assert entry["output"]["variance"] == layer.output.variance
        assert entry["kernel_shape"] == list(layer.kernel_shape)
        assert entry["predicted_shift_share"] == layer.predicted_shift_share(0.2, 0.9, 3)
        assert "filters" not in entry
    assert told["critical_lr"] == min(layer.critical_lr for layer in diagnosis.layers if layer.critical_lr is not None)
    filters = diagnosis.to_dict(filters=True)["layers"][1]["filters"]
    assert filters["mean"] == model[4].weight.double().flatten(1).mean(1).tolist()
    assert len(filters["average_step"]) == 6
    assert "Diagnosis" in repr(diagnosis)
    assert "None" not in rendered(diagnosis)


@pytest.mark.parametrize("imported", ["pws", "pws.diagnosis"])
def test_import_loads_nothing_to_draw_with(imported: str) -> None:
    code = (
        f"import sys, {imported}; print([m for m in ('rich', 'plotly', 'matplotlib', 'lightning') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_a_diagnosis_loads_nothing_to_draw_with() -> None:
    code = """
import sys, torch, pws.diagnosis
found = pws.diagnose(torch.nn.Linear(3, 2), torch.ones(4, 3), lambda out: out.square().sum(), lr=0.1)
found.to_dict(), repr(found), found.verdict
print([m for m in ("rich", "plotly", "matplotlib", "lightning", "timm") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_the_update_to_weight_ratio_at_a_rate() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 5))
    batch = torch.randn(8, 1, 6, 6), torch.arange(8) % 5
    told = diagnose(model, batch, nn.functional.cross_entropy, lr=0.25).to_dict()["layers"][0]["update_to_weight"]
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    assert told == pytest.approx(float(0.25 * model[1].weight.grad.norm() / model[1].weight.norm()), rel=1e-5)
    assert diagnose(model, batch, nn.functional.cross_entropy).to_dict()["layers"][0]["update_to_weight"] is None
