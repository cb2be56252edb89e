"""Which layers `pws.diagnose` finds, in which order and called how often, and how it takes a batch."""

from __future__ import annotations

import math

import pytest
import torch
from diagnose_helpers import (
    TwoInputs,
    hooks,
    square,
)
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn import functional as F

import pws
from pws.diagnosis import diagnose

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
