"""The learning rate's factor at each step of the optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable

from pws.training.recipe import OptimConfig


def lr_factor(optim: OptimConfig, steps: int, steps_per_epoch: int) -> Callable[[int], float]:
    """Factor on the learning rate, by number of steps done: `warmup(s) * schedule(s)`, `steps` in all.

    With `w` warm-up steps, warmup is `min(1, (s + 1) / w)`, and with `t = (s - w) / (steps - w)` for `s >= w`, else 0:
    constant 1; step `decay ^ (milestones passed)`; cosine `(1 + cos(pi t)) / 2`; linear `1 - t`.

    Examples:
        >>> factor = lr_factor(OptimConfig(schedule="linear"), steps=4, steps_per_epoch=2)
        >>> [factor(s) for s in range(5)]
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    warmup_steps = round(optim.warmup_epochs * steps_per_epoch)
    milestones = [epoch * steps_per_epoch for epoch in optim.milestones]

    def factor(step: int) -> float:
        warmup = 1.0 if step >= warmup_steps else (step + 1) / warmup_steps
        t = min(1.0, max(0, step - warmup_steps) / max(1, steps - warmup_steps))
        schedules: dict[str, float] = {
            "constant": 1.0,
            "step": optim.decay ** sum(step >= milestone for milestone in milestones),
            "cosine": (1 + math.cos(math.pi * t)) / 2,
            "linear": 1 - t,
        }
        return warmup * schedules[optim.schedule]

    return factor
