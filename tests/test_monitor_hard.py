"""Models that a monitor could break, or be fooled by: each of these did once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import pws


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.head = nn.Conv2d(1, 8, 3), pws.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(lambda t: F.relu(self.inner(t)), F.relu(self.first(x)), use_reentrant=False)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class FromActivations(nn.Module):
    """A convolution whose kernel is computed from its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.router, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 144), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.conv2d(x, self.router(x.mean((0, 2, 3))).view(4, 4, 3, 3))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


BATCH = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4


@pytest.mark.parametrize(
    ("kind", "layer", "critical"), [(Checkpointed, "inner", "infinite"), (FromActivations, None, "finite")]
)
def test_kernels_are_mapped_outside_the_forward_pass(kind: type[nn.Module], layer: str | None, critical: str) -> None:
    def trained(monitored: bool) -> tuple[list[Tensor], pws.Monitor]:
        torch.manual_seed(0)
        model = kind()
        monitor = pws.Monitor(model, every=1)
        if monitored:
            monitor.__enter__()
        for _ in range(3):
            F.cross_entropy(model(BATCH[0]), BATCH[1]).backward()
        monitor.__exit__(None, None, None)
        return [p.grad for p in model.parameters()], monitor

    (plain, _), (watched, monitor) = trained(False), trained(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert [d.step for d in monitor.history] == [0, 1, 2]
    rows = {row.name: row for row in monitor.history[-1].layers}
    row = rows[layer or kind.__name__]
    assert row.critical_lr is not None
    assert math.isinf(row.critical_lr) == (critical == "infinite")


def test_several_passes_a_step_are_measured_in_turn() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    with pws.Monitor(model, every=10) as monitor:
        for _ in range(30):
            (model(BATCH[0]) - model(BATCH[0].flip(0))).square().sum().backward()
    assert len(monitor.history) > 6
    assert all(layer.gradient is not None for diagnosis in monitor.history for layer in diagnosis.layers)


def test_a_clock_that_jumps_and_starts_late() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    steps = iter(range(70, 400, 3))  # as after a resume, with two optimizers beside this one
    with pws.Monitor(model, every=50) as monitor:
        monitor.clock = lambda: next(steps)
        for _ in range(100):
            F.cross_entropy(model(BATCH[0]), BATCH[1]).backward()
    taken = [diagnosis.step for diagnosis in monitor.history]
    assert taken[0] == 70
    # The first step at or behind each multiple of 50, beside those 1, 2, 4, 8 ... behind the start.
    assert {100, 151, 202, 250, 301, 352} <= set(taken)


def test_a_zero_head_hides_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
    nn.init.zeros_(model[3].weight)
    diagnosis = pws.diagnose(model, BATCH, F.cross_entropy, lr=1000)
    assert diagnosis.verdict.cause == "no gradient"
    assert diagnosis.verdict.layer == "0"
    assert diagnosis.layers[1].critical_lr is None
    assert diagnosis.layers[1].note == "its output is constant"


def test_a_norm_is_seen_behind_a_variance_near_its_eps() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    with torch.no_grad():
        model[0].weight.mul_(0.02)
    diagnosis = pws.diagnose(model, BATCH, F.cross_entropy)
    assert diagnosis.layers[0].output.variance < 1e-3
    assert [layer.normalized for layer in diagnosis.layers] == [True, False]


def test_a_layer_shared_by_scales_in_front_of_a_norm() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.norm, self.head = nn.Conv2d(1, 8, 3, bias=False), nn.GroupNorm(2, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            maps = [F.relu(self.norm(self.shared(level))).mean((2, 3)) for level in (x, F.avg_pool2d(x, 2))]
            logits: Tensor = self.head(maps[0] + maps[1])
            return logits

    # Large inputs: beside a small variance GroupNorm's eps lets the scale through.
    shared, head = pws.diagnose(Pyramid(), (30 * BATCH[0], BATCH[1]), F.cross_entropy).layers
    assert (shared.calls, shared.normalized, head.normalized) == (2, True, False)


def test_a_loss_that_is_not_finite_behind_finite_outputs() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels) * math.nan

    assert pws.diagnose(model, BATCH, loss).verdict.cause == "non-finite loss"
    with pws.Monitor(model, every=50) as monitor:
        for number in range(6):  # step 5 is not measured
            value = F.cross_entropy(model(BATCH[0]), BATCH[1])
            if number < 5:
                monitor.observe(value).backward()
            else:
                with pytest.warns(pws.CollapseWarning, match="step 5: .*, but the loss is not"):
                    monitor.observe(value * math.nan)
    assert monitor.first_unhealthy is not None
    assert monitor.first_unhealthy.step == 5
