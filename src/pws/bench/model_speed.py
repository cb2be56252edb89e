"""What a model costs: a training step and inference with its norms, without them, and with pws in their place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, Final

import torch
from torch import nn

from pws.bench.timers import TimedStep
from pws.bench.timing import costs, measure
from pws.optim import SGD
from pws.surgery import fold, plan
from pws.training.model_and_data import ModelAndData, load_model

WITHOUT: Final = "without norms"
"""The row that all ratios are to."""
AS_IT_IS: Final = "as it is"
PWS: Final = "pws"
ROWS: Final = (WITHOUT, AS_IT_IS, PWS)
TASKS: Final = ("training step", "inference")
LR: Final = 1e-4
MOMENTUM: Final = 0.9


def compare_model(
    spec: str, batch_size: int, image_size: int, seconds: float, say: Callable[[str], None]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Task to row to `Cost`, as plain values; each task is timed for about `seconds`.

    Raises:
        PwsError: there is no such model, it can't be converted, or it does not take these images.
    """
    load_model(spec, batch_size=batch_size, image_size=image_size)  # what is wrong is said before processes start
    found = {}
    for task in TASKS:
        builders = {row: partial(build_step, spec, batch_size, image_size, row, task) for row in ROWS}
        timings = measure(f"{spec}, {task}", builders, seconds, 1, say)
        found[task] = {row: asdict(cost) for row, cost in costs(timings, WITHOUT).items()}
    return found


def build_step(spec: str, batch_size: int, image_size: int, row: str, task: str) -> TimedStep:
    """The step of one row: a training step of SGD with momentum, or a forward pass in eval mode, where pws is folded."""
    given = load_model(spec, batch_size=batch_size, image_size=image_size)
    given.model = _variant(given, row)
    given.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return _inference(given) if task == "inference" else _training(given, marked=row == PWS)


def _variant(given: ModelAndData, row: str) -> nn.Module:
    """The model of a row. Without marks, the converted model is the model without norms."""
    if row == AS_IT_IS:
        return given.model
    converted = plan(given.model, given.images).apply()
    return converted if row == PWS else fold(converted)


def _training(given: ModelAndData, *, marked: bool) -> TimedStep:
    model = given.model.train()
    own = SGD if marked else torch.optim.SGD
    optimizer = own(model if marked else model.parameters(), lr=LR, momentum=MOMENTUM)  # type: ignore[arg-type]

    def train() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(given.loss(model(given.images)))
        optimizer.step()

    return TimedStep(train, model)


def _inference(given: ModelAndData) -> TimedStep:
    model = fold(given.model).eval()

    def infer() -> None:
        with torch.inference_mode():
            model(given.images)

    return TimedStep(infer, model)
