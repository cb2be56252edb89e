"""A diagnosis of marked layers, whose optimizer moves `w` and `alpha`: the same as that of the layers that compute their
kernel from them, and what a real step does."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn import functional as F

import pws
import pws.optim
from pws._errors import PwsError
from pws._mark import adopt, filters_of, mark, mark_of, unmark
from pws.diagnosis import Diagnosis, LayerDiagnosis, Monitor, diagnose, forecast
from pws.diagnosis.recording.marked import kernel_step

Batch = tuple[Tensor, Tensor]
Build = Callable[[], nn.Module]


def fresh(layer: nn.Module, gain: float = 2**0.5, **settings: Any) -> nn.Module:
    """A marked layer in float64 whose alphas and bias are not those of the start."""
    layer = mark(layer.double(), gain=gain, reset_parameters=True, **settings)
    with torch.no_grad():
        filters = filters_of(layer, layer.weight)
        scales = torch.linspace(0.5, 1.5, len(filters), dtype=torch.float64).view(-1, *[1] * (filters.dim() - 1))
        layer.weight.copy_(filters_of(layer, filters * scales))
    return layer


def mixed() -> nn.Sequential:
    """Standardized and plain layers, some in front of a norm, and most kinds."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(fresh(nn.Conv2d(3, 8, 3, padding=1)), nn.ReLU()),
        *(fresh(nn.Conv2d(8, 12, 3, groups=4, dilation=2), relative_gamma=True), nn.ReLU()),
        *(nn.Conv2d(12, 6, 3, bias=False).double(), nn.BatchNorm2d(6).double(), nn.ReLU()),
        *(fresh(nn.ConvTranspose2d(6, 9, 3, stride=2, groups=3), gamma=0.1), nn.ReLU()),
        *(fresh(nn.Conv2d(9, 4, 1)), nn.GroupNorm(2, 4).double(), nn.Flatten(2)),
        *(fresh(nn.Conv1d(4, 5, 3, stride=3)), nn.ReLU(), fresh(nn.ConvTranspose1d(5, 4, 2)), nn.ReLU()),
        *(nn.AdaptiveAvgPool1d(4), nn.Flatten(), fresh(nn.Linear(16, 10), gain=1.0)),
    )


def volumes() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 3)), fresh(nn.Conv3d(1, 4, 3, padding=1)), nn.ReLU()),
        *(fresh(nn.ConvTranspose3d(4, 2, 2)), nn.ReLU(), nn.Flatten()),
    )


def narrow() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(fresh(nn.Conv2d(3, 8, 3)), nn.ReLU(), fresh(nn.Conv2d(8, 8, 3)), nn.ReLU()),
        *(nn.Flatten(), fresh(nn.Linear(8 * 8 * 8, 10), gain=1.0)),
    )


def batches(count: int = 1, samples: int = 8) -> list[Batch]:
    torch.manual_seed(1)
    return [(torch.rand(samples, 3, 12, 12, dtype=torch.float64), torch.randint(10, (samples,))) for _ in range(count)]


def latents(layer: nn.Module) -> tuple[Tensor, Tensor]:
    found = mark_of(layer)
    assert found is not None
    return adopt(filters_of(layer, layer.weight), found)


def layer_form(model: nn.Module, latents: Callable[[nn.Module], tuple[Tensor, Tensor]] = latents) -> nn.Module:
    """A copy whose marked layers compute their kernel from what `latents` says of the original layer."""
    made = deepcopy(model)
    for layer, original in zip(made.modules(), model.modules(), strict=True):
        found = mark_of(layer)
        if found is None:
            continue
        w, alpha = latents(original)
        del layer.pws
        layer.__class__ = getattr(pws, type(layer).__name__)
        layer.gain, layer.gamma, layer.relative_gamma = found.gain, found.gamma, found.relative_gamma
        trained, dtype = layer._parameters["weight"].requires_grad, layer._parameters["weight"].dtype
        layer.alpha = nn.Parameter(alpha.to(dtype), requires_grad=trained)
        with torch.no_grad():
            layer.weight.copy_(filters_of(original, w))
    return made


def same(mine: Any, theirs: Any, row: str = "identity float64") -> None:
    """All numbers within the row of the table, everything else equal."""
    if isinstance(mine, Diagnosis):
        assert any(math.isinf(layer.critical_lr or 0) for layer in mine.layers)
        mine, theirs = mine.to_dict(filters=True), theirs.to_dict(filters=True)
    if isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        for key in mine:
            same(mine[key], theirs[key], row)
    elif isinstance(mine, list):
        assert len(mine) == len(theirs)
        for one, other in zip(mine, theirs, strict=True):
            same(one, other, row)
    elif isinstance(mine, float | Tensor):
        assert_close(mine, theirs, row)
    else:
        assert mine == theirs


def layer_numbers(layer: LayerDiagnosis) -> dict[str, Any]:
    return {**vars(layer), **vars(layer.filters), "filters": None, "input": None, "output": None, "gradient": None}


@pytest.mark.parametrize("build", [mixed, volumes, narrow])
@pytest.mark.parametrize("lr", [None, 0.3])
def test_a_marked_model_is_told_the_same_as_the_layer_form(build: Build, lr: float | None) -> None:
    model = build()
    forms, batch = (model, layer_form(model)), batches()[0]
    mine, theirs = (diagnose(form, batch, F.cross_entropy, lr=lr, momentum=0.9, steps=3) for form in forms)
    same(mine, theirs)
    assert str(mine.verdict) == str(theirs.verdict)
    standardized = [layer for layer in mine.layers if layer.kind.endswith(", pws")]
    assert len(standardized) == sum(mark_of(module) is not None for module in model.modules())
    for layer in standardized:
        assert layer.average_gradient_ratio == 0
        assert layer.critical_lr == math.inf
        assert (layer.update_ratio or 0) > 0
        assert (layer.average_gradient or 0) > 0


def test_the_kind_names_the_class_and_that_it_is_standardized(tmp_path: Path) -> None:
    model = mixed()
    diagnosis = diagnose(model, batches()[0], F.cross_entropy)
    kinds = [layer.kind for layer in diagnosis.layers]
    assert kinds[:4] == ["Conv2d, pws", "Conv2d, pws", "Conv2d", "ConvTranspose2d, pws"]
    assert '<td class="text">ConvTranspose2d, pws</td>' in diagnosis.html(tmp_path / "report.html").read_text()


def test_a_network_of_marked_layers_alone_is_healthy_at_any_rate() -> None:
    verdict = diagnose(narrow(), batches()[0], F.cross_entropy, lr=1e6).verdict
    assert verdict.cause == "healthy"
    assert "every trained kernel keeps its mean" in verdict.finding


# --- The latents of an optimizer ---


class Holding(torch.optim.SGD):
    """Not one of torch's own."""


def holding(model: nn.Module, size: float = 3.0) -> torch.optim.SGD:
    """An optimizer whose state has latents of another size than adopted ones."""
    sgd = Holding(model.parameters(), lr=0.1)
    for layer in model.modules():
        found = mark_of(layer)
        if found is not None:
            w, _ = latents(layer)
            w = size * w + 0.5  # a mean that the kernel does not show
            kernel = pws.standardize(w, gain=found.gain, gamma=found.gamma, relative_gamma=found.relative_gamma)
            dims = tuple(range(1, w.dim()))
            alpha = (filters_of(layer, layer.weight) * kernel).sum(dims) / kernel.square().sum(dims)
            sgd.state[layer.weight].update(w=w, alpha=alpha.detach())
    return sgd


def test_latents_of_the_optimizer_decide_the_step() -> None:
    model, batch = mixed(), batches()[0]
    sgd = holding(model)
    before = {weight: {key: value.clone() for key, value in state.items()} for weight, state in sgd.state.items()}
    mine = diagnose(model, batch, F.cross_entropy, optimizer=sgd)
    twin = layer_form(model, lambda layer: tuple(sgd.state[layer.weight].values()))
    same(mine, diagnose(twin, batch, F.cross_entropy))
    adopted = diagnose(model, batch, F.cross_entropy)
    assert mine.layers[0].update_ratio < 0.5 * adopted.layers[0].update_ratio
    assert sgd.state.keys() == before.keys()
    for weight, state in before.items():
        assert all(torch.equal(value, sgd.state[weight][key]) for key, value in state.items())


def test_a_layer_that_the_optimizer_does_not_hold_is_adopted() -> None:
    model, batch = narrow(), batches()[0]
    of_head = Holding(model[-1].parameters(), lr=0.1)
    of_head.state = {model[-1].weight: dict(zip(("w", "alpha"), latents(model[-1]), strict=True))}
    mine = diagnose(model, batch, F.cross_entropy, optimizer=of_head)
    same(mine, diagnose(model, batch, F.cross_entropy))


def test_a_weight_that_was_written_to_is_adopted_anew() -> None:
    model, batch = narrow(), batches()[0]
    sgd = holding(model)
    for layer in (module for module in model if mark_of(module) is not None):
        mark(layer, gain=mark_of(layer).gain, reset_parameters=True)
    same(*(diagnose(model, batch, F.cross_entropy, optimizer=given) for given in (sgd, None)))


def test_an_optimizer_that_does_not_standardize_is_refused() -> None:
    model, batch = narrow(), batches()[0]
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        PwsError, match=r"the layer '0' is marked, and torch\.optim\.SGD moves its weight as a plain one"
    ):
        diagnose(model, batch, F.cross_entropy, optimizer=sgd)
    with pytest.raises(PwsError, match=r"'module\.0' is marked"):
        Monitor(nn.DataParallel(model), optimizer=sgd)
    with pytest.raises(PwsError, match="got a dict"):
        diagnose(model, batch, F.cross_entropy, optimizer=sgd.state_dict())  # type: ignore[arg-type]
    plain = nn.Sequential(nn.Flatten(), nn.Linear(432, 10).double())
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    with_it, without = (diagnose(plain, batch, F.cross_entropy, optimizer=given) for given in (sgd, None))
    assert with_it.to_dict() == without.to_dict()


def predicted(model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer) -> tuple[Diagnosis, dict[str, Tensor]]:
    """A diagnosis, and the step of each marked kernel that it is made of."""
    diagnosis = diagnose(model, batch, F.cross_entropy, optimizer=optimizer)
    layers = {name: module for name, module in model.named_modules() if mark_of(module) is not None}
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    steps = {name: kernel_step(layer, layer.weight.grad, optimizer) for name, layer in layers.items()}
    optimizer.zero_grad()
    return diagnosis, steps


@pytest.mark.parametrize("build", [mixed, volumes, narrow])
def test_a_real_step_is_the_one_predicted(build: Build) -> None:
    model, batch, tiny = build(), batches()[0], 1e-7
    sgd = pws.optim.SGD(model, lr=1.0, step_bound=None)
    for _ in range(3):  # away from the latents of the start
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        sgd.step()
        sgd.zero_grad()
    diagnosis, steps = predicted(model, batch, sgd)
    kernels = {name: model.get_submodule(name).weight.detach().clone() for name in steps}
    for group in sgd.param_groups:
        group["lr"] = tiny
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    sgd.step()
    rows = {layer.name: layer for layer in diagnosis.layers}
    for name, kernel in kernels.items():
        change = (kernel - model.get_submodule(name).weight.detach()) / tiny
        assert_close(steps[name] / change.norm(), change / change.norm(), "finite difference")
        assert rows[name].update_ratio == pytest.approx(float(change.norm() / kernel.norm()), rel=1e-6)
        assert_close(
            filters_of(model.get_submodule(name), change).flatten(1).mean(1) / change.norm(),
            rows[name].filters.average_step,
            "finite difference",
        )
    adopted = {layer.name: layer.update_ratio for layer in diagnose(model, batch, F.cross_entropy).layers}
    assert any(rows[name].update_ratio != pytest.approx(adopted[name], rel=1e-3) for name in kernels)


@pytest.mark.parametrize("in_backward", [False, True], ids=["step", "step in backward"])
def test_the_monitor_measures_before_the_step(in_backward: bool) -> None:
    def trained(watched: bool) -> tuple[list[Tensor], list[Diagnosis], list[Diagnosis]]:
        model, measured, expected = mixed(), [], []
        sgd = pws.optim.SGD(model, lr=0.1, momentum=0.9, step_in_backward=in_backward)
        with ExitStack() as stack:
            monitor = stack.enter_context(Monitor(model, 1, optimizer=sgd)) if watched else None
            for images, labels in batches(3):
                if not watched:
                    expected.append(diagnose(model, (images, labels), F.cross_entropy, optimizer=sgd))
                F.cross_entropy(model(images), labels).backward()
                sgd.step()
                sgd.zero_grad()
            measured += monitor.history if monitor is not None else []
        return [p.detach() for p in model.parameters()], measured, expected

    (watched, measured, _), (alone, _, expected) = trained(watched=True), trained(watched=False)
    assert all(torch.equal(one, other) for one, other in zip(watched, alone, strict=True))
    assert len(measured) == len(expected) == 3
    for one, other in zip(measured, expected, strict=True):
        same([layer_numbers(layer) for layer in one.layers], [layer_numbers(layer) for layer in other.layers])


# --- Models of every sort ---


def test_frozen_layers_are_noted() -> None:
    model, batch = narrow(), batches()[0]
    model[2].weight.requires_grad = False
    mine = diagnose(model, batch, F.cross_entropy)
    same(mine, diagnose(layer_form(model), batch, F.cross_entropy))
    assert [layer.note for layer in mine.layers] == ["", "its kernel is not trained", ""]
    assert mine.layers[1].update_ratio is None


class Shared(nn.Module):
    """A layer that is called twice, and one whose weight another layer uses, as it is and turned."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.twice = fresh(nn.Linear(12, 8)), fresh(nn.Linear(8, 8))
        self.head = nn.Linear(12, 10).double()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x.mean((1, 2))))
        y = F.relu(self.twice(F.relu(self.twice(y))))
        kernel = self.first.kernel() if isinstance(self.first, pws.Linear) else self.first.weight
        out: Tensor = self.head(F.relu(F.linear(y, kernel.t())))
        return out


def test_shared_layers_and_a_kernel_used_elsewhere() -> None:
    model, batch = Shared(), batches()[0]
    mine = diagnose(model, batch, F.cross_entropy)
    same(mine, diagnose(layer_form(model), batch, F.cross_entropy))
    assert [layer.calls for layer in mine.layers] == [1, 2, 1, 1]
    assert mine.layers[2].kernel_shape == (12, 8)


def test_a_weight_that_two_marked_layers_share() -> None:
    model, batch = narrow(), batches()[0]
    model.insert(3, fresh(nn.Conv2d(8, 8, 3, padding=1)))
    model[3].weight = model[2].weight
    first, second = diagnose(model, batch, F.cross_entropy).layers[1:3]
    twin = layer_form(model)
    twin[3].weight, twin[3].alpha = twin[2].weight, twin[2].alpha
    same(diagnose(model, batch, F.cross_entropy), diagnose(twin, batch, F.cross_entropy))
    assert first.update_ratio == second.update_ratio


def test_no_step_shifts_a_marked_filter_in_bfloat16() -> None:
    model, (images, labels) = narrow().bfloat16(), batches()[0]
    mine, theirs = (diagnose(m, (images.bfloat16(), labels), F.cross_entropy) for m in (model, layer_form(model)))
    for one, other in zip(mine.layers, theirs.layers, strict=True):
        assert one.critical_lr == other.critical_lr == math.inf
        assert one.average_gradient_ratio == 0
        assert one.update_ratio == pytest.approx(other.update_ratio, rel=0.05)


def test_no_step_shifts_a_marked_filter_under_autocast() -> None:
    model, (images, labels) = narrow().float(), batches()[0]
    with torch.autocast("cpu", torch.bfloat16):
        layers = diagnose(model, (images.float(), labels), F.cross_entropy).layers
    assert all(layer.critical_lr == math.inf and layer.average_gradient_ratio == 0 for layer in layers)
    exact = diagnose(model, (images.float(), labels), F.cross_entropy).layers
    for one, other in zip(layers, exact, strict=True):
        assert one.update_ratio == pytest.approx(other.update_ratio, rel=0.05)


def test_wrapped_models_and_channels_last() -> None:
    model, batch = narrow(), batches()[0]
    expected = diagnose(model, batch, F.cross_entropy, optimizer=holding(model))
    torch._dynamo.reset()
    try:
        for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
            same(diagnose(wrapped, batch, F.cross_entropy, optimizer=holding(model)), expected)
    finally:
        torch._dynamo.reset()
    model.to(memory_format=torch.channels_last)
    same(diagnose(model, batch, F.cross_entropy, optimizer=holding(model)), expected)


def test_one_process_of_a_distributed_model(tmp_path: Path) -> None:
    model, batch = narrow(), batches()[0]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        same(diagnose(wrapped, batch, F.cross_entropy), diagnose(layer_form(model), batch, F.cross_entropy))
    finally:
        torch.distributed.destroy_process_group()


def test_a_marked_layer_with_weights_that_are_not_finite() -> None:
    model, batch = narrow(), batches()[0]
    with torch.no_grad():
        model[2].weight[0, 0, 0, 0] = math.nan
    mine = diagnose(model, batch, F.cross_entropy)
    assert mine.verdict.cause == "non-finite weight"
    assert mine.verdict.layer == "2"


# --- Monitor and forecast ---


@pytest.mark.parametrize("given", [True, False], ids=["optimizer", "adopted"])
def test_the_monitor_measures_as_a_diagnosis_of_a_scaled_loss(given: bool) -> None:
    model = narrow()
    sgd = holding(model) if given else None
    with Monitor(model, 1, optimizer=sgd) as monitor:
        monitor.loss_scale = 0.25
        for images, labels in batches(3):
            monitor.observe(F.cross_entropy(model(images), labels) / 4).backward()
    for measured, batch in zip(monitor.history, batches(3), strict=True):
        expected = diagnose(model, batch, F.cross_entropy, optimizer=sgd)
        same([layer_numbers(layer) for layer in measured.layers], [layer_numbers(layer) for layer in expected.layers])


def test_a_forecast_is_that_of_the_layer_form() -> None:
    model = narrow()
    pair = batches(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mine, theirs = (forecast(m, pair, F.cross_entropy) for m in (model, layer_form(model)))
    assert mine.diverging_lr == pytest.approx(theirs.diverging_lr, rel=1e-6)
    assert mine.passes == theirs.passes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [type(layer) for layer in model if mark_of(layer) is not None] == [nn.Conv2d, nn.Conv2d, nn.Linear]
    unmark(model)
    assert mine.diverging_lr != pytest.approx(forecast(model, pair, F.cross_entropy).diverging_lr, rel=0.1)
