"""One model: converted, run, trained for five steps, folded, copied."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pws
from benchmarks.convert.models import shape_of
from pws import optim
from pws._batch import tensors_in
from pws.bench.result_file import commit
from pws.models import model_of
from pws.surgery.norms import NORMS
from pws.surgery.standardized import is_standardized

STEPS: Final = 5
LR: Final = 0.1
LARGEST: Final = 150_000_000
"""Parameters; larger models are not run."""
EQUAL: Final = 1e-3
"""The largest difference allowed between a network and its fold, in units of the outputs' deviation: 8-digit rounding through
hundreds of layers."""


@dataclass
class Checked:
    """What became of a model."""

    parameters: int
    parameters_after: int | None = None
    standardized: int = 0
    removed: int = 0
    kept_norms: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    fold_difference: float | None = None
    failures: list[str] = field(default_factory=list)
    not_run: str | None = None
    commit: str = ""


def check_model(spec: str) -> Checked:
    """Convert the model that `spec` names and do everything that a user would; failures are noted, not raised."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = model_of(spec)
    checked = Checked(sum(p.numel() for p in model.parameters()), commit=commit())
    if checked.parameters > LARGEST:
        checked.not_run = f"more than {LARGEST // 10**6} million parameters"
        return checked
    with note_failures(checked):
        _check(model, torch.randn(shape_of(spec)), checked)
    return checked


@contextmanager
def note_failures(checked: Checked) -> Iterator[None]:
    """Anything may go wrong in other people's models: that is what is counted."""
    try:
        yield
    except Exception as error:
        checked.failures.append(f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")


def compare_with_plan(plan: pws.Plan, model: nn.Module, converted: nn.Module, checked: Checked) -> dict[str, bool]:
    """Note what the plan says of the converted model, and whether that is so: failure to whether it did not happen."""
    chosen = plan.named("standardize")
    classes = [type(model.get_submodule(name)) for name in chosen]
    is_norm = NORMS["batch"]
    left = [name for name, module in converted.named_modules() if any(test(module) for test in is_norm)]
    checked.standardized, checked.removed = len(chosen), len(plan.named("remove"))
    checked.parameters_after = sum(p.numel() for p in converted.parameters())
    checked.kept_norms, checked.skipped = left, plan.named("skip")
    return {
        "a norm is left that the plan does not list": set(left) <= set(plan.named("keep")),
        "a layer's class is another": [type(converted.get_submodule(name)) for name in chosen] == classes,
        "other layers are marked than the plan lists": set(pws.marked(converted)) <= set(chosen),
        "the plan's number of parameters is wrong": checked.parameters_after == plan.parameters_after,
    }


def _check(model: nn.Module, example: Tensor, checked: Checked) -> None:
    plan = pws.plan(model, example)
    converted = plan.apply()
    checks = compare_with_plan(plan, model, converted, checked)
    del model
    converted.eval()
    with torch.no_grad():
        output = _logits(converted(example))
        checks["the output is not finite"] = bool(torch.isfinite(output).all())
        folded = pws.fold(converted)
        checks["a fold holds a mark"] = not any(map(is_standardized, folded.modules()))
        checked.fold_difference = float((_logits(folded(example)) - output).abs().max() / output.std())
        checks["the fold differs"] = checked.fold_difference < EQUAL
        del folded
        copy = deepcopy(converted)
        copy.load_state_dict(converted.state_dict())
        checks["a copy differs"] = torch.equal(_logits(copy(example)), output)
        del copy
    checked.losses = _train(converted.train(), example)
    checks["the loss is not finite"] = all(math.isfinite(loss) for loss in checked.losses)
    checked.failures += [failure for failure, passed in checks.items() if not passed]


def _train(model: nn.Module, example: Tensor) -> list[float]:
    optimizer = optim.SGD(pws.param_groups(model, lr=LR, weight_decay=5e-4), momentum=0.9)
    labels, losses = torch.arange(len(example)), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(_logits(model(example)), labels)
        losses.append(float(loss.detach()))
        torch.autograd.backward(loss)
        optimizer.step()
    return losses


def _logits(outputs: Any) -> Tensor:
    """`(N, classes)` of the first output, averaged over pixels."""
    first = next(tensor for tensor in tensors_in(outputs) if tensor.is_floating_point())
    return first.flatten(2).mean(2) if first.dim() > 2 else first
