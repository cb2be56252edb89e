"""A monitor beside what training does: gradients inside the model or the loss, random masks, a GradScaler."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn import functional as F

import pws
from pws.diagnosis import Monitor


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pws.CollapseWarning)
        yield


# --- Gradients inside the model or the loss ---


class Force(nn.Module):
    """The gradient of an energy, as models of molecules compute it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 1))
        self.settings = settings

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (force,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return force


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1))


def penalized(model: nn.Module, x: Tensor) -> Tensor:
    """WGAN-GP: the gradient by the input is to have length 1."""
    x = x.clone().requires_grad_()
    outputs = model(x)
    (gradient,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
    penalty: Tensor = (gradient.norm(dim=1) - 1).square().mean()
    return outputs.mean() + 10 * penalty


def looked_ahead(model: nn.Module, x: Tensor) -> Tensor:
    """A gradient by the parameters inside the loss, as MAML and gradient matching take it."""
    loss = model(x).square().mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    return loss + sum(gradient.square().sum() for gradient in gradients)


def adversarial(model: nn.Module, x: Tensor) -> Tensor:
    """A gradient without a graph, and the loss of the same pass."""
    x = x.clone().requires_grad_()
    loss: Tensor = model(x).square().mean()
    (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
    return loss * (1 + gradient.abs().mean())


INNER: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "in the model": (Force, lambda model, x: model(x).square().mean()),
    "of the input, in the loss": (network, penalized),
    "of the parameters, in the loss": (network, looked_ahead),
    "without a graph": (network, adversarial),
}


@pytest.mark.parametrize("case", INNER)
def test_the_training_pass_is_told_from_gradients_inside_it(case: str) -> None:
    build, loss_of = INNER[case]

    def trained(watched: bool) -> tuple[list[Tensor], list[float], list[list[Tensor]], Monitor]:
        torch.manual_seed(1)
        model = build()
        monitor, losses, gradients = Monitor(model, every=1), [], []
        sgd = torch.optim.SGD(model.parameters(), lr=0.01)
        if watched:
            monitor.__enter__()
        for i in range(4):
            sgd.zero_grad()
            loss = loss_of(model, torch.randn(8, 3, generator=torch.Generator().manual_seed(i)))
            (monitor.observe(loss) if i != 2 else loss).backward()
            losses.append(float(loss.detach()))
            gradients.append([m.weight.grad.clone() for m in model.modules() if isinstance(m, nn.Linear)])
            sgd.step()
        monitor.__exit__(None, None, None)
        return list(model.parameters()), losses, gradients, monitor

    (alone, *_), (watched, losses, gradients, monitor) = trained(False), trained(True)
    assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))
    assert [diagnosis.step for diagnosis in monitor.history] == [0, 1, 2, 3]
    assert [d.loss for d in monitor.history] == [losses[0], losses[1], None, losses[3]]  # its own, or none
    for diagnosis, expected in zip(monitor.history, gradients, strict=True):
        for layer, gradient in zip(diagnosis.layers, expected, strict=True):
            assert_close(layer.filters.average_gradient, gradient.double().mean(1), "float32")


@pytest.mark.parametrize("case", ["in the model", "of the input, in the loss"])
def test_a_diagnosis_is_that_of_the_whole_gradient(case: str) -> None:
    build, loss_of = INNER[case]
    model, x = build(), torch.randn(8, 3)
    forward = (lambda model, batch: model(batch[0])) if isinstance(model, Force) else (lambda m, b: loss_of(m, b[0]))
    loss = (lambda outputs: outputs.square().mean()) if isinstance(model, Force) else None
    found = pws.diagnose(model, (x,), loss, forward=forward)
    loss_of(model, x).backward()
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for layer, module in zip(found.layers, linears, strict=True):
        assert_close(layer.filters.average_gradient, module.weight.grad.double().mean(1), "float32")


def test_an_inner_gradient_leaves_nothing_where_the_loss_is_not_finite() -> None:
    found = pws.diagnose(Force(), (torch.randn(8, 3),), lambda outputs: outputs.square().mean() / 0)
    assert found.verdict.cause == "non-finite loss"
    assert all(layer.gradient is None for layer in found.layers)


def test_a_backward_pass_with_a_graph_is_one_of_training() -> None:
    """Optimizers of second order take `backward(create_graph=True)`."""
    model = network()
    with Monitor(model, every=1) as monitor:
        model(torch.randn(8, 3)).square().mean().backward(create_graph=True)
    assert len(monitor.history) == 1
    assert all(layer.gradient is not None for layer in monitor.history[0].layers)
    model.zero_grad()


def test_parameters_without_a_kernel_are_trained_too() -> None:
    model = network()
    for module in (model[0], model[2]):
        module.weight.requires_grad_(False)
    with Monitor(model, every=1) as monitor:
        model(torch.randn(8, 3)).square().mean().backward()
    assert len(monitor.history) == 1


# --- Random masks ---


def torch_mask(shape: torch.Size) -> Tensor:
    return torch.rand(shape) < 0.3


def python_mask(shape: torch.Size) -> Tensor:
    return torch.tensor([random.random() < 0.3 for _ in range(shape.numel())]).view(shape)


def numpy_mask(shape: torch.Size) -> Tensor:
    return torch.from_numpy(np.random.rand(*shape) < 0.3)


class Masked(nn.Module):
    """Now and then a random mask hides a whole row, and the softmax of nothing is NaN."""

    def __init__(self, mask: Callable[[torch.Size], Tensor]) -> None:
        super().__init__()
        self.scores, self.head, self.mask = nn.Linear(4, 4), nn.Linear(4, 2), mask

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(x)
        logits: Tensor = self.head(scores.masked_fill(self.mask(scores.shape), -torch.inf).softmax(-1))
        return logits


@pytest.mark.parametrize("seen", ["outputs", "loss"])
@pytest.mark.parametrize("mask", [torch_mask, python_mask, numpy_mask])
def test_a_mask_of_chance_is_drawn_again(mask: Callable[[torch.Size], Tensor], seen: str) -> None:
    random.seed(1)
    np.random.seed(1)
    model = Masked(mask)
    with Monitor(model, every=1000) as monitor:
        for step in range(300):
            assert step < 299, "no mask hid a row"
            outputs = model(torch.randn(4, 4))
            hidden = outputs.nan_to_num() if seen == "outputs" else outputs
            loss = monitor.observe(hidden.square().mean())
            states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
            if not torch.isfinite(outputs).all():
                break
            loss.backward()
    assert states[0] == random.getstate()
    assert step & (step - 1), "the step must be one that is not measured"
    assert (monitor.verdict.cause, monitor.verdict.layer) == ("non-finite input", "head")
    assert monitor.first_unhealthy.step == step


def test_logits_that_are_masked_are_no_collapse() -> None:
    class Allowed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).masked_fill(torch.tensor([False, True, False]), -torch.inf)

    model = Allowed(nn.Linear(3, 3))
    with Monitor(model, every=1000) as monitor:
        for number in range(8):
            x = torch.randn(4, 3) if number < 6 else torch.full((4, 3), torch.nan)
            monitor.observe(F.cross_entropy(model(x), torch.tensor([0, 2, 0, 2]))).backward()
    assert monitor.first_unhealthy.step == 6


def test_what_no_layer_did_is_not_called_healthy() -> None:
    class Log(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).log()

    model = Log(nn.Linear(3, 2))
    nn.init.constant_(model[0].bias, 100.0)
    with Monitor(model, every=1000) as monitor:
        for number in range(8):
            if number == 5:
                nn.init.constant_(model[0].bias, -100.0)
            model(torch.randn(4, 3))
    assert monitor.first_unhealthy.step == 5
    assert (monitor.verdict.cause, monitor.verdict.layer) == ("non-finite output", None)
    assert "every layer with a weight is finite" in monitor.verdict.finding
    assert sum(diagnosis.verdict.cause != "healthy" for diagnosis in monitor.history) == 1


def test_a_step_that_can_not_be_looked_at_again_does_not_end_training() -> None:
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, batches: Iterator[Tensor]) -> Tensor:
            batch = next(batches, None)
            if batch is None:
                raise RuntimeError("there is no batch left")
            outputs: Tensor = self.layer(batch)
            return outputs

    model = Once()
    with Monitor(model, every=1000) as monitor:
        for _ in range(3):
            model(iter([torch.ones(2, 3)]))
        with pytest.warns(pws.CollapseWarning, match="step 3 .* no batch left"):
            model(iter([torch.full((2, 3), math.inf)]))
        model(iter([torch.ones(2, 3)]))
    assert monitor.first_unhealthy is None


# --- A GradScaler ---


def image_net() -> nn.Sequential:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(16, 10))


@pytest.mark.parametrize(
    "how", ["observed before scaling", "observed before scaling, scale told", "scaled, scale told"]
)
def test_a_gradient_that_overflows_is_skipped(how: str) -> None:
    model = image_net()
    sgd, scaler = torch.optim.SGD(model.parameters(), 0.05), torch.amp.GradScaler("cpu", init_scale=2.0**24)
    losses, skipped = [], []
    with Monitor(model, every=5, lr=0.05) as monitor:
        for _ in range(24):
            if "told" in how:
                monitor.loss_scale = scaler.get_scale()
            sgd.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(model(torch.randn(32, 3, 12, 12)), torch.randint(0, 10, (32,)))
            losses.append(float(loss.detach()))
            if how.startswith("observed"):
                scaler.scale(monitor.observe(loss)).backward()
            else:
                monitor.observe(scaler.scale(loss)).backward()
            before = scaler.get_scale()
            scaler.step(sgd)
            scaler.update()
            skipped.append(scaler.get_scale() < before)
    assert skipped[0], "the scale must be too large at first"
    assert not skipped[-1]
    assert monitor.history[0].verdict.cause == "non-finite gradient"
    assert monitor.first_unhealthy is None
    assert monitor.verdict.cause == "healthy"
    assert monitor.last_healthy is monitor.history[-1]
    assert [d.loss for d in monitor.history] == pytest.approx([losses[d.step] for d in monitor.history])


def test_the_numbers_are_those_without_a_scale() -> None:
    batch = torch.randn(8, 3, 12, 12), torch.arange(8)
    with Monitor(plain := image_net(), every=1) as expected:
        expected.observe(F.cross_entropy(plain(batch[0]), batch[1])).backward()
    with Monitor(model := image_net(), every=1) as monitor:
        loss = monitor.observe(F.cross_entropy(model(batch[0]), batch[1]))
        (loss * 1024).backward()
    assert monitor.history[0].to_dict(filters=True) == expected.history[0].to_dict(filters=True)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("skips", [True, False])
def test_an_overflow_in_the_forward_pass(scale: float, skips: bool) -> None:
    """Without a scaler it is a collapse; a scaler skips the step, and training goes on."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    sgd = torch.optim.SGD(model.parameters(), 0.01 / scale)
    with Monitor(model, every=1) as monitor:
        for number in range(6):
            sgd.zero_grad()
            loss = monitor.observe(model(torch.randn(4, 3) * (math.inf if number == 3 else 1.0)).square().mean())
            (loss * scale).backward()
            if number != 3 or not skips:
                sgd.step()
    assert (monitor.first_unhealthy is None) == (skips and scale > 1)
    assert [d.step for d in monitor.history][:4] == [0, 1, 2, 3]
    assert len({d.step for d in monitor.history}) == len(monitor.history)


def test_a_gradient_that_somebody_skipped_without_telling() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with Monitor(model, every=1) as monitor:
        for number in range(3):
            outputs = model(torch.randn(4, 3))
            (outputs.sum() if number != 1 else (outputs - outputs.detach()).abs().sqrt().sum()).backward()
            if number == 1:
                assert monitor.first_unhealthy is not None
    assert monitor.history[1].verdict.cause == "non-finite gradient"
    assert monitor.first_unhealthy is None


@pytest.mark.parametrize("every", [1.5, 0, -1, "2", None])
def test_every_is_a_number_of_steps(every: Any) -> None:
    with pytest.raises(pws.PwsError, match="a whole number, at least 1; got"):
        Monitor(nn.Linear(2, 2), every)


def test_a_dict_of_losses_is_observed_as_its_sum() -> None:
    model = network()
    with Monitor(model, every=1) as monitor:
        outputs = model(torch.randn(8, 3))
        loss = monitor.observe({"a": outputs.mean(), "b": outputs.square().mean()})
        loss.backward()
    assert monitor.history[0].loss == pytest.approx(float((outputs.mean() + outputs.square().mean()).detach()))
