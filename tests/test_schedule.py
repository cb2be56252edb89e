"""The learning rate's factor against the schedules' published formulas and torch's schedulers."""

from __future__ import annotations

import pytest
import torch
from torch.optim import lr_scheduler

from pws.training.recipe import OptimConfig
from pws.training.schedule import lr_factor

STEPS, PER_EPOCH = 24, 4


def rates(scheduler_of: object, steps: int = STEPS) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = scheduler_of(optimizer)  # type: ignore[operator]
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("optim", "torch_scheduler"),
    [
        (OptimConfig(schedule="constant"), lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
        (OptimConfig(schedule="cosine"), lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=STEPS)),
        (OptimConfig(schedule="linear"), lambda o: lr_scheduler.PolynomialLR(o, total_iters=STEPS, power=1.0)),
        (
            OptimConfig(schedule="step", milestones=[2, 3], decay=0.2),
            lambda o: lr_scheduler.MultiStepLR(o, milestones=[2 * PER_EPOCH, 3 * PER_EPOCH], gamma=0.2),
        ),
    ],
    ids=lambda value: getattr(value, "schedule", ""),
)
def test_against_torch(optim: OptimConfig, torch_scheduler: object) -> None:
    factor = lr_factor(optim, STEPS, PER_EPOCH)
    assert [factor(step) for step in range(STEPS)] == pytest.approx(rates(torch_scheduler), abs=1e-12)


def test_warm_up_rises_to_the_schedule() -> None:
    factor = lr_factor(OptimConfig(schedule="linear", warmup_epochs=1.5), STEPS, PER_EPOCH)
    assert [factor(step) for step in range(6)] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0])
    assert factor(6) == 1.0
    assert factor(15) == pytest.approx(0.5)
    assert factor(STEPS) == 0.0
