"""`pws.Monitor` and its Lightning callback: what is measured, what is kept, and that training does not feel it."""

from __future__ import annotations

import csv
import gc
import math
import random
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from pws import Monitor
from pws._errors import PwsError
from pws.diagnosis import CollapseWarning, Diagnosis, diagnose
from pws.methods import build_method
from pws.models import build_model
from pws.surgery.standardized import to_layers
from pws.training.monitor import MonitorCallback

Batch = tuple[Tensor, Tensor]


def digits(count: int, size: int = 16) -> list[Batch]:
    raw = load_digits()
    pixels = torch.tensor(raw.images[: count * size], dtype=torch.float32)[:, None] / 8 - 0.6
    labels = torch.tensor(raw.target[: count * size])
    return list(zip(pixels.split(size), labels.split(size), strict=True))


def net(method: str = "none", model: str = "stack4") -> nn.Module:
    torch.manual_seed(1)
    built = build_model(model, build_method(method), in_channels=1, num_classes=10, width=0.06)
    to_layers(built)  # which torch's own optimizers train; test_diagnose_marked.py has the other form
    return built


def noisy() -> nn.Sequential:
    """BatchNorm's buffers and dropout's random numbers: what a monitor could disturb."""
    torch.manual_seed(1)
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3)),
        *(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)),
    )


def step(model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, monitor: Monitor | None = None) -> float:
    loss = F.cross_entropy(model(batch[0]), batch[1])
    if monitor is not None:
        loss = monitor.observe(loss)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def watch(
    model: nn.Module,
    steps: int,
    *,
    before: Callable[[int, nn.Module], None] = lambda *_: None,
    lr: float = 0.0,
    one_batch: bool = True,
    observe: bool = False,
    **settings: Any,
) -> tuple[Monitor, list[str]]:
    """A monitored run, `before(number, model)` in front of each step; the monitor and what it warned of."""
    batches, sgd = digits(steps), torch.optim.SGD(model.parameters(), lr=lr)
    with warnings.catch_warnings(record=True) as caught, Monitor(model, **settings) as monitor:
        warnings.simplefilter("always")
        for number in range(steps):
            before(number, model)
            step(model, batches[0 if one_batch else number], sgd, monitor if observe else None)
    return monitor, [str(w.message) for w in caught if w.category is CollapseWarning]


def steps_of(monitor: Monitor) -> list[int | None]:
    return [diagnosis.step for diagnosis in monitor.history]


def content(diagnosis: Diagnosis, *less: str) -> dict[str, Any]:
    return {key: v for key, v in diagnosis.to_dict(filters=True).items() if key not in ("step", "model", *less)}


def hooks(model: nn.Module) -> list[int]:
    kinds = [kind for kind in vars(model) if kind.endswith("_hooks") or "_hooks_" in kind]
    assert len(kinds) > 6
    of_modules = [len(getattr(module, kind)) for module in model.modules() for kind in kinds]
    of_parameters = [
        len(p._backward_hooks or ()) + len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()
    ]
    return of_modules + of_parameters


# --- Which steps ---


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (5, [0, 1, 2, 4, 5, 8, 10, 15, 16, 20]),
        (1, list(range(21))),
        (50, [0, 1, 2, 4, 8, 16]),
    ],
)
def test_measured_steps(every: int, expected: list[int]) -> None:
    monitor, _ = watch(net(), 21, every=every)
    assert steps_of(monitor) == expected
    assert monitor.first_unhealthy is None
    assert monitor.last_healthy is monitor.history[-1] is monitor.shown


def test_the_clock_numbers_the_steps() -> None:
    # Two passes a step, as when gradients are accumulated: the first one is measured.
    numbers = [3, 3, 4, 4, 5, 5, 6, 6, 7, 7]
    model, seen = net(), []
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    with Monitor(model, 5) as monitor:
        for number, batch in zip(numbers, digits(10), strict=True):
            monitor.clock = lambda number=number: number
            seen.append(step(model, batch, sgd, monitor))
    assert steps_of(monitor) == [3, 4, 5, 7]  # the first, and 1, 2 and 4 later
    assert [d.loss for d in monitor.history] == [seen[0], seen[2], seen[4], seen[8]]


def test_training_is_unchanged_in_the_memory_format_of_training() -> None:
    # One channel of images in channels_last: dimensions of size 1, whose strides an alias must keep.
    def trained(monitored: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = build_model("allconv", build_method("none"), in_channels=1, num_classes=10, width=0.1)
        model = model.to(memory_format=torch.channels_last)
        sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        with Monitor(model, 1) if monitored else nullcontext():
            for images, labels in digits(3):
                big = F.interpolate(images, 16).contiguous(memory_format=torch.channels_last)
                step(model, (big, labels), sgd)
        return list(model.parameters())

    assert all(torch.equal(a, b) for a, b in zip(trained(True), trained(False), strict=True))


def test_passes_that_do_not_train_are_not_counted() -> None:
    model, batch = net("bn"), digits(1)[0]
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, 1) as monitor:
        for _ in range(3):
            step(model, batch, sgd)
            model.eval()
            model(batch[0]).sum().backward()
            model.train()
            with torch.no_grad():
                model(batch[0])
            with torch.inference_mode():
                model(batch[0])
    assert steps_of(monitor) == [0, 1, 2]
    assert all(d.settings.training for d in monitor.history)


def test_a_forward_pass_without_a_backward_pass_is_forgotten() -> None:
    model, twin, batches = net(), net(), digits(4)
    with Monitor(model, 1) as monitor:
        pending = model(batches[0][0])
        F.cross_entropy(model(batches[1][0]), batches[1][1]).backward()
        assert steps_of(monitor) == [1]
        pending.sum().backward()  # late: its measurement is gone, and must not be taken for another's
        assert steps_of(monitor) == [1]
        F.cross_entropy(model(batches[2][0]), batches[2][1]).backward()
        model(batches[3][0])
    assert steps_of(monitor) == [1, 2]
    expected = [diagnose(twin, batch, F.cross_entropy) for batch in batches[1:3]]
    for found, wanted in zip(monitor.history, expected, strict=True):
        assert content(found, "loss") == content(wanted, "loss")


# --- The same numbers as a diagnosis ---


@pytest.mark.parametrize("method", ["none", "bn", "gn", "wn", "ws", "pws"])
def test_the_history_is_that_of_diagnoses(method: str) -> None:
    model = net(method)
    twin, batches, expected = deepcopy(model), digits(6), []
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with Monitor(model, 2, lr=0.1, momentum=0.9) as monitor:
        for number, batch in enumerate(batches):
            twin.load_state_dict(model.state_dict())
            if number != 3 and number != 5:
                expected.append(content(diagnose(twin, batch, F.cross_entropy, lr=0.1, momentum=0.9)))
            step(model, batch, sgd, monitor)
    assert steps_of(monitor) == [0, 1, 2, 4]
    assert [content(diagnosis) for diagnosis in monitor.history] == expected
    assert len({diagnosis.loss for diagnosis in monitor.history}) == 4
    rates = [layer.critical_lr for layer in monitor.history[-1].layers]
    assert all(math.isinf(rate) if method == "pws" else rate > 0 for rate in rates)


@pytest.mark.parametrize("method", ["none", "wn", "pws"])
def test_a_scaled_loss_gives_the_same_numbers(method: str) -> None:
    model, batch = net(method), digits(1)[0]
    expected = content(diagnose(deepcopy(model), batch, F.cross_entropy))
    with Monitor(model, 1) as monitor:
        monitor.loss_scale = 1024.0  # a power of two: exact
        monitor.observe(F.cross_entropy(model(batch[0]), batch[1]) * 1024).backward()
    assert content(monitor.history[0]) == expected


def test_accumulated_gradients_are_told_apart() -> None:
    model, batches = net("wn"), digits(3)
    expected = [content(diagnose(deepcopy(model), batch, F.cross_entropy)) for batch in batches]
    with Monitor(model, 1) as monitor:
        monitor.loss_scale = 0.5
        for batch in batches:  # no zero_grad in between
            monitor.observe(F.cross_entropy(model(batch[0]), batch[1]) / 2).backward()
    assert [content(diagnosis) for diagnosis in monitor.history] == expected


def test_wrapped_models() -> None:
    torch._dynamo.reset()
    try:
        plain, wrapped = net("wn"), {"compiled": net("wn"), "parallel": net("wn")}
        before = hooks(plain)
        expected, _ = watch(plain, 4, every=2, lr=0.1, one_batch=False, observe=True)
        outer = {
            "compiled": torch.compile(wrapped["compiled"], backend="eager"),
            "parallel": nn.DataParallel(wrapped["parallel"]),
        }
        for name, model in outer.items():
            monitor, _ = watch(model, 4, every=2, lr=0.1, one_batch=False, observe=True)
            assert steps_of(monitor) == [0, 1, 2], name
            assert [d.to_dict(filters=True) for d in monitor.history] == [
                d.to_dict(filters=True) for d in expected.history
            ]
            for mine, theirs in zip(wrapped[name].parameters(), plain.parameters(), strict=True):
                assert torch.equal(mine, theirs)
            assert hooks(wrapped[name]) == before
            assert sum(hooks(model)) == sum(before)
    finally:
        torch._dynamo.reset()


# --- Training does not feel it ---


def trained(model: nn.Module, lr: float, *, watched: bool, steps: int = 12) -> dict[str, Any]:
    """Everything that training leaves, to compare bit for bit."""
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    monitor = Monitor(model, 5, lr=lr) if watched else None
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapseWarning)
        if monitor is not None:
            monitor.__enter__()
        losses += [step(model, batch, sgd, monitor) for batch in digits(steps)]
        if monitor is not None:
            monitor.__exit__(None, None, None)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    return {
        "tensors": {name: t.detach().double().nan_to_num(1e99).tolist() for name, t in {**state, **gradients}.items()},
        "losses": [str(loss) for loss in losses],
        "random": (random.getstate(), torch.get_rng_state().tolist(), str(np.random.get_state())),
        "unhealthy": None if monitor is None else monitor.first_unhealthy,
    }


@pytest.mark.parametrize("build", [noisy, *(lambda m=m: net(m) for m in ("bn", "wn", "pws"))])
@pytest.mark.parametrize("lr", [0.05, 1e18], ids=["healthy", "overflowing"])
def test_training_is_bitwise_the_same(build: Callable[[], nn.Module], lr: float) -> None:
    watched, alone = (trained(build(), lr, watched=watched) for watched in (True, False))
    unhealthy = watched.pop("unhealthy")
    alone.pop("unhealthy")
    assert watched == alone
    assert (unhealthy is not None) == (lr > 1)
    assert len(set(alone["losses"])) > 1


def test_an_overflowing_run_is_seen_in_an_unmeasured_step() -> None:
    """The case above is of use only if the pass that runs again, in a step that is not measured, is among it."""
    model = noisy()
    torch.manual_seed(3)
    weights = [p.clone() for p in model.parameters()]
    buffers, state = [], []

    def before(number: int, model: nn.Module) -> None:
        if number == 3:
            with torch.no_grad():
                model[-1].weight.mul_(1e38).mul_(1e38)
        torch.manual_seed(number)

    def run(watched: bool) -> int | None:
        with torch.no_grad():
            for parameter, weight in zip(model.parameters(), weights, strict=True):
                parameter.copy_(weight)
        model[1].reset_running_stats()
        sgd = torch.optim.SGD(model.parameters(), lr=0.0)
        with warnings.catch_warnings(), Monitor(model if watched else nn.Linear(1, 1)) as monitor:
            warnings.simplefilter("ignore", CollapseWarning)
            for number in range(5):
                before(number, model)
                step(model, digits(1)[0], sgd)
        buffers.append(str([b.tolist() for b in model.buffers()]))
        state.append(torch.get_rng_state().tolist())
        return None if monitor.first_unhealthy is None else monitor.first_unhealthy.step

    assert (run(True), run(False)) == (3, None)
    assert buffers[0] == buffers[1]
    assert state[0] == state[1]


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net("wn")
        self.fail = False

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.net(images)
        if self.fail:
            raise KeyError("mine")
        return out


def failing(_: Tensor) -> Tensor:
    raise KeyError("mine")


@pytest.mark.parametrize("where", ["nowhere", "before", "forward", "forward of another step", "loss", "backward"])
def test_no_hook_is_left(where: str) -> None:
    model, batch = Failing(), digits(1)[0]
    model.net.features[0].register_forward_hook(lambda *_: None)  # the user's own, which stays
    before, passes = hooks(model), 3 if where == "forward of another step" else 2
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)

    def train() -> None:
        with Monitor(model, 50):
            assert sum(hooks(model)) > sum(before)
            for _ in range(passes):
                step(model, batch, sgd)
            if where == "before":
                raise KeyError("mine")
            model.fail = where.startswith("forward")
            out = model(batch[0])
            if where == "loss":
                raise KeyError("mine")
            if where == "backward":
                out.register_hook(failing)
            F.cross_entropy(out, batch[1]).backward()

    if where == "nowhere":
        train()
    else:
        with pytest.raises(KeyError, match="mine"):
            train()
    assert hooks(model) == before
    model.fail = False
    expected = deepcopy(model)
    step(model, batch, sgd)  # and the model still trains
    assert not torch.equal(next(model.parameters()), next(expected.parameters()))


def test_a_monitor_goes_on_after_an_exception_that_was_caught() -> None:
    model, batch = Failing(), digits(1)[0]
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    with Monitor(model, 1) as monitor:
        step(model, batch, sgd)
        model.fail = True
        with pytest.raises(KeyError, match="mine"):
            model(batch[0])
        model.fail = False
        step(model, batch, sgd)
    assert len(monitor.history) == 2
    assert content(monitor.history[0]) == content(monitor.history[1])


def test_memory_does_not_grow() -> None:
    model, batch = net("wn"), digits(1)[0]
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    alive: list[weakref.ref[Tensor]] = []
    for module in model.modules():
        module.register_forward_hook(lambda _, __, out: alive.append(weakref.ref(out)))
    counts = []
    gc.collect()
    with Monitor(model, 1) as monitor:
        for number in range(50):
            step(model, batch, sgd)
            if number in (9, 49):
                monitor.history.clear()  # it grows by design
                monitor.last_healthy = None
                gc.collect()
                assert [ref for ref in alive if ref() is not None] == []
                counts.append(sum(isinstance(found, Tensor) for found in gc.get_objects()))
            elif number == 8:
                monitor.history[:] = monitor.history[:1]
    assert len(alive) > 50 * 10
    assert counts[1] <= counts[0]


# --- What is kept of a collapse ---


def poison(model: nn.Module) -> None:
    with torch.no_grad():
        model.features[4].weight.mul_(1e30)
        model.features[6].weight.mul_(1e30)


def test_outputs_that_overflow_in_an_unmeasured_step() -> None:
    def before(number: int, model: nn.Module) -> None:
        if number == 3:
            poison(model)

    monitor, warned = watch(net(), 8, before=before, one_batch=False, every=50, lr=0.01)
    assert steps_of(monitor) == [0, 1, 2, 3]  # there is nothing to learn from step 4
    assert monitor.first_unhealthy is monitor.history[-1] is monitor.shown
    assert monitor.last_healthy is monitor.history[2]
    verdict = monitor.verdict
    assert verdict is monitor.first_unhealthy.verdict
    assert (verdict.cause, verdict.layer) == ("exploding", "features.4")
    assert [layer.finite for layer in monitor.history[-1].layers] == [True, True, True, False, False]
    assert "step 3" in warned[0]
    assert len(warned) == 1
    # The re-run pass is the one that overflowed, so the numbers before the break are those of its batch.
    fine = net()
    monitor_again, _ = watch(fine, 4, one_batch=False, every=1, lr=0.01)
    assert monitor.history[3].layers[0].output == monitor_again.history[3].layers[0].output


@pytest.mark.parametrize("number", [3, 4], ids=["unmeasured", "measured"])
def test_a_loss_that_is_not_finite(number: int) -> None:
    model, batch = net(), digits(1)[0]
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    with warnings.catch_warnings(record=True) as caught, Monitor(model) as monitor:
        warnings.simplefilter("always")
        for _ in range(number):
            step(model, batch, sgd, monitor)
        loss = monitor.observe(F.cross_entropy(model(batch[0]), batch[1]) * math.inf)
        loss.backward()
    assert monitor.first_unhealthy is not None
    assert monitor.first_unhealthy.step == number
    assert monitor.last_healthy is not None
    assert monitor.last_healthy.step == 2
    assert [w.category for w in caught] == [CollapseWarning]
    assert monitor.verdict is not None
    assert monitor.verdict.cause != "healthy"


def test_observe_returns_the_loss_and_keeps_its_value() -> None:
    model, batch = net(), digits(1)[0]
    with Monitor(model, 1) as monitor:
        loss = F.cross_entropy(model(batch[0]), batch[1])
        assert monitor.observe(loss) is loss
        loss.backward()
        model(batch[0]).sum().backward()
    assert monitor.history[0].loss == float(loss.detach())
    assert monitor.history[1].loss is None


def move_mean(at: int, by: float, layer: int = 4) -> Callable[[int, nn.Module], None]:
    def before(number: int, model: nn.Module) -> None:
        if number == at:
            with torch.no_grad():
                model.features[layer].weight.add_(by)

    return before


def test_a_shift_that_crosses_the_bound() -> None:
    monitor, warned = watch(net(), 9, before=move_mean(3, 5.0), every=50)
    assert steps_of(monitor) == [0, 1, 2, 4, 8]  # nothing overflows: it goes on
    assert monitor.first_unhealthy is not None
    assert monitor.first_unhealthy.step == 4
    assert monitor.last_healthy is monitor.history[2]
    verdict = monitor.verdict
    assert (verdict.cause, verdict.layer) == ("shift", "features.4")
    assert "At step 4 their means" in verdict.finding
    shares = [d.layers[2].shift_share for d in (monitor.last_healthy, monitor.first_unhealthy)]
    assert shares[0] < 0.9 <= shares[1]
    assert len(warned) == 1


@pytest.mark.parametrize(("bound", "expected"), [(0.2, True), (0.6, True), (0.8, False)])
def test_the_shift_bound_is_what_counts(bound: float, expected: bool) -> None:
    monitor, _ = watch(net(), 3, before=move_mean(2, 0.25), every=1, shift_bound=bound)
    first, last = monitor.history[0], monitor.history[-1]
    crossed = [
        now.name
        for now, then in zip(last.layers, first.layers, strict=True)
        if now.shift_share >= bound > then.shift_share
    ]
    assert crossed == (["features.4"] if expected else [])
    assert (monitor.first_unhealthy is not None) == expected


def test_a_layer_that_starts_above_the_bound_is_not_taken_over() -> None:
    monitor, _ = watch(net(), 3, every=1, shift_bound=0.02)
    assert max(layer.shift_share for layer in monitor.history[0].layers) > 0.02
    assert monitor.first_unhealthy is None


@pytest.mark.parametrize(("change", "found"), [(10**-3.1, True), (10**-2.9, False)])
def test_a_variance_that_falls_to_a_thousandth(change: float, found: bool) -> None:
    def before(number: int, model: nn.Module) -> None:
        if number == 3:
            with torch.no_grad():
                model.features[4].weight.mul_(change**0.5)

    monitor, warned = watch(net(), 5, before=before, every=50)
    variance = [d.layers[2].output.variance for d in monitor.history]
    assert variance[-1] / variance[0] == pytest.approx(change, rel=1e-3)
    assert len(warned) == found
    if found:
        assert monitor.first_unhealthy is monitor.history[-1]
        assert (monitor.verdict.cause, monitor.verdict.layer) == ("vanishing", "features.4")


def test_a_variance_that_falls_little_by_little_is_not_called_healthy() -> None:
    def before(number: int, model: nn.Module) -> None:
        if number:
            with torch.no_grad():
                model.head.weight.mul_(10**-0.9)

    monitor, warned = watch(net(), 3, before=before, every=1)
    assert monitor.first_unhealthy is monitor.history[2]
    assert len(warned) == 1
    assert (monitor.verdict.cause, monitor.verdict.layer) == ("vanishing", "head")


def test_a_layer_that_starts_at_zero_may_learn() -> None:
    model = net()
    nn.init.zeros_(model.head.weight)
    monitor, _ = watch(model, 6, every=1, lr=0.1, one_batch=False)
    variance = [d.layers[-1].output.variance for d in monitor.history]
    assert variance[0] == 0 < variance[-1]
    assert monitor.first_unhealthy is None


def test_measuring_ends_when_an_overflow_follows_a_shift() -> None:
    def before(number: int, model: nn.Module) -> None:
        move_mean(2, 5.0)(number, model)
        if number == 5:
            poison(model)

    monitor, warned = watch(net(), 12, before=before, every=50)
    assert monitor.first_unhealthy is not None
    assert monitor.first_unhealthy.step == 2
    assert len(warned) == 1
    assert steps_of(monitor)[-1] == 5, "the overflow is worth a look, every step after it is not"


# --- Where the numbers go ---


def test_the_csv_file(tmp_path: Path) -> None:
    path = tmp_path / "monitor.csv"
    monitor, _ = watch(net("wn"), 5, every=2, lr=0.05, one_batch=False, observe=True, csv_path=path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        *("step", "layer", "loss", "input_variance", "output_variance", "gradient_variance", "transmission"),
        *("transmission_product", "shift_share", "centred", "shift", "covariance", "gradient_transmission"),
        *("average_gradient", "average_gradient_ratio", "update_ratio", "critical_lr"),
    ]
    layers = [(d, layer) for d in monitor.history for layer in d.layers]
    assert len(rows) == len(layers) == 4 * 5
    for row, (diagnosis, layer) in zip(rows, layers, strict=True):
        assert (int(row["step"]), row["layer"]) == (diagnosis.step, layer.name)
        assert float(row["loss"]) == diagnosis.loss
        assert float(row["input_variance"]) == layer.input.variance
        assert float(row["gradient_variance"]) == layer.gradient.variance
        assert float(row["shift_share"]) == layer.shift_share
        assert float(row["critical_lr"]) == layer.critical_lr
        assert (row["gradient_transmission"] == "") == (layer.gradient_transmission is None)


@pytest.mark.parametrize("broken", [None, "features.4", "features.0"])
def test_the_log_gets_finite_numbers(broken: str | None) -> None:
    seen: list[tuple[dict[str, float], int]] = []

    def before(number: int, model: nn.Module) -> None:
        if broken and number == 3:
            with torch.no_grad():
                model.get_submodule(broken).weight.fill_(math.nan)

    monitor, _ = watch(net(), 5, before=before, every=50, log=lambda metrics, step: seen.append((metrics, step)))
    assert [step for _, step in seen] == steps_of(monitor)
    assert [step for _, step in seen] == ([0, 1, 2, 3] if broken else [0, 1, 2, 4])
    for metrics, _ in seen:
        assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values()), metrics
    first = seen[0][0]
    layer = monitor.history[0].layers[2]
    assert first["monitor/shift_share/features.4"] == layer.shift_share
    assert first["monitor/output_variance/features.4"] == layer.output.variance
    assert first["monitor/critical_lr"] == monitor.history[0].critical_lr
    assert first["monitor/largest_shift_share"] == max(la.shift_share for la in monitor.history[0].layers)


def test_nothing_is_known_before_the_first_measurement() -> None:
    monitor = Monitor(net())
    assert (monitor.verdict, monitor.shown, monitor.history) == (None, None, [])
    with monitor:
        model = monitor.model
        model(digits(1)[0][0])
    assert monitor.verdict is None


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"every": 0}, "at least 1; got 0"),
        ({"every": -3}, "at least 1; got -3"),
        ({"shift_bound": 0.0}, "above 0 and below 1; got 0.0"),
        ({"shift_bound": 1.0}, "above 0 and below 1"),
        ({"shift_bound": math.nan}, "above 0 and below 1"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"momentum": 1.0}, "momentum must be"),
    ],
    ids=str,
)
def test_wrong_arguments(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(PwsError, match=told):
        Monitor(net(), **settings)


# --- As a Lightning callback ---


class Tiny(LightningModule):
    def __init__(self, batches: list[Batch], rate: float = 0.1, attribute: str = "model") -> None:
        super().__init__()
        self.attribute, self.batches, self.rate, self.fail_at = attribute, batches, rate, -1
        setattr(self, attribute, net("wn"))

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.batches, batch_size=None)

    def training_step(self, batch: Batch, number: int) -> Tensor:
        loss = F.cross_entropy(getattr(self, self.attribute)(batch[0]), batch[1])
        if number == self.fail_at:
            raise KeyError("mine")
        return loss

    def configure_optimizers(self) -> Any:
        sgd = torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.5)
        halving = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 0.5**step)
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": halving, "interval": "step"}}


def fit(module: Tiny, callback: MonitorCallback | None, **settings: Any) -> None:
    Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        callbacks=[] if callback is None else [callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, **settings},
    ).fit(module)


@pytest.fixture
def batches() -> list[Batch]:
    return digits(6)


def test_the_callback_follows_the_optimizer(batches: list[Batch]) -> None:
    watched, alone, callback = Tiny(batches), Tiny(batches), MonitorCallback(3)
    fit(watched, callback)
    fit(alone, None)
    history = callback.monitor.history
    assert [d.step for d in history] == [0, 1, 2, 3, 4]
    assert [d.settings.lr for d in history] == [0.1 * 0.5**d.step for d in history]
    assert {d.settings.momentum for d in history} == {0.5}
    expected = diagnose(net("wn"), batches[0], F.cross_entropy, lr=0.1, momentum=0.5)
    assert content(history[0]) == content(expected)
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), alone.parameters(), strict=True))
    assert hooks(watched.model) == hooks(net("wn"))


def test_the_callback_takes_hooks_off_after_an_exception(batches: list[Batch]) -> None:
    module = Tiny(batches)
    module.fail_at = 2
    with pytest.raises(KeyError, match="mine"):
        fit(module, MonitorCallback())
    assert hooks(module.model) == hooks(net("wn"))


def test_accumulated_batches_give_the_averages_of_whole_ones(batches: list[Batch]) -> None:
    # Each batch twice, and half the gradient of each: the same step, to the last bit.
    whole, halves = MonitorCallback(2), MonitorCallback(2)
    twice = [batch for batch in batches for _ in range(2)]
    fit(Tiny(batches), whole)
    fit(Tiny(twice), halves, accumulate_grad_batches=2)
    assert [d.step for d in whole.monitor.history] == [0, 1, 2, 4]
    assert [d.to_dict(filters=True) for d in halves.monitor.history] == [
        d.to_dict(filters=True) for d in whole.monitor.history
    ]
    losses = [d.loss for d in whole.monitor.history]
    assert all(a != b for a, b in pairwise(losses))


def test_the_network_has_another_name(batches: list[Batch]) -> None:
    callback = MonitorCallback(attribute="network")
    fit(Tiny(batches, attribute="network"), callback)
    assert len(callback.monitor.history) == 4
    with pytest.raises(PwsError, match=r"Tiny has no module called 'model'.*attribute="):
        fit(Tiny(batches, attribute="network"), MonitorCallback())


def test_the_callback_logs_to_the_trainers_logger(tmp_path: Path, batches: list[Batch]) -> None:
    callback = MonitorCallback(3)
    fit(Tiny(batches), callback, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("monitor/critical_lr")]
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3, 4]
    for row, diagnosis in zip(rows, callback.monitor.history, strict=True):
        assert float(row["monitor/critical_lr"]) == pytest.approx(diagnosis.critical_lr)
        for layer in diagnosis.layers:
            assert float(row[f"monitor/output_variance/{layer.name}"]) == pytest.approx(layer.output.variance)
