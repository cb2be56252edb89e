"""Other ways to hold PWS at large learning rates, in the cells of the grid `ablation`: what else was tried for the bound
on the step, and other forms of alpha. Writes accuracy/rules.json, in the format of `pws bench accuracy`, after every cell,
and goes on where it stopped.

    python benchmarks/rules.py
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from pws.bench.accuracy.cell import train_cell
from pws.bench.accuracy.grid import Cell, load_grid
from pws.bench.accuracy.report import markdown
from pws.bench.result import write_result
from pws.methods import Method, build_method
from pws.training.quiet import quiet_lightning

FILE = Path(__file__).parent / "accuracy" / "rules.json"


def weights_of(optimizer: Optimizer) -> list[tuple[nn.Parameter, Tensor, float]]:
    """Parameter, gradient and largest learning rate."""
    groups = optimizer.param_groups
    return [(p, p.grad, group["initial_lr"]) for group in groups for p in group["params"] if p.grad is not None]


def each_tensor(_: nn.Module, optimizer: Optimizer) -> None:
    """Every tensor's step is at most 0.02 long."""
    for _, gradient, lr in weights_of(optimizer):
        gradient.mul_((0.02 / (lr * gradient.norm())).clamp(max=1))


def all_together(_: nn.Module, optimizer: Optimizer) -> None:
    """The step of the whole network is at most 0.1 long."""
    scale_all(optimizer, 0.1 / optimizer.param_groups[0]["initial_lr"])


def scale_all(optimizer: Optimizer, norm: float) -> None:
    """Clip to a global norm."""
    torch.nn.utils.clip_grad_norm_([p for p, _, _ in weights_of(optimizer)], norm)


def relative(_: nn.Module, optimizer: Optimizer) -> None:
    """Every tensor's step is at most 1 % of the tensor's norm, or of 1 where that is smaller (a bias starts at 0)."""
    for parameter, gradient, lr in weights_of(optimizer):
        allowed = 0.01 * parameter.detach().norm().clamp(min=1.0)
        gradient.mul_((allowed / (lr * gradient.norm())).clamp(max=1))


def present_rate(_: nn.Module, optimizer: Optimizer) -> None:
    """The step of the whole network is at most 0.1 long at the scheduled rate of the moment, not at the largest."""
    scale_all(optimizer, 0.1 / optimizer.param_groups[0]["lr"])


class Quantile:
    """Clip to the 10th percentile of the gradient's last 100 norms."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def __call__(self, _: nn.Module, optimizer: Optimizer) -> None:
        """Clip."""
        gradients = [gradient for _, gradient, _ in weights_of(optimizer)]
        self.norms = [*self.norms[-99:], float(torch.nn.utils.get_total_norm(gradients))]
        scale_all(optimizer, sorted(self.norms)[len(self.norms) // 10])


def by_unit(model: nn.Module, _: Optimizer) -> None:
    """Adaptive gradient clipping at 0.05 of each filter's norm."""
    adaptive_clip_grad(list(model.parameters()), 0.05)


class Exp(nn.Module):
    """alpha = exp(a), a = 0 at first."""

    def forward(self, raw: Tensor) -> Tensor:
        """From a to alpha."""
        return raw.exp()

    def right_inverse(self, alpha: Tensor) -> Tensor:
        """From alpha to a."""
        return alpha.log()


class Bounded(nn.Module):
    """alpha = 2 sigmoid(a), a = 0 at first: between 0 and 2."""

    def forward(self, raw: Tensor) -> Tensor:
        """From a to alpha."""
        return 2 * raw.sigmoid()

    def right_inverse(self, alpha: Tensor) -> Tensor:
        """From alpha to a."""
        return (alpha / 2).logit()


def with_alpha(form: Callable[[], nn.Module]) -> Method:
    """PWS with another form of alpha."""
    method = build_method("pws")

    def conv(*sizes: Any, **settings: Any) -> nn.Module:
        return parametrize.register_parametrization(method.conv(*sizes, **settings), "alpha", form())

    def head(*sizes: int) -> nn.Module:
        return parametrize.register_parametrization(method.head(*sizes), "alpha", form())

    return replace(method, conv=conv, head=head)


def with_rule(rule: Any) -> Method:
    """PWS with another rule for the gradients in place of the bound."""
    return replace(build_method("pws"), gradients=rule, step_bound=None)


ROWS: dict[str, Callable[[], Method]] = {
    "the whole step at most 0.1": lambda: with_rule(all_together),
    "the whole step at most 0.1 at the rate of the moment": lambda: with_rule(present_rate),
    "each tensor's step at most 0.02": lambda: with_rule(each_tensor),
    "each tensor's step at most 1 % of it": lambda: with_rule(relative),
    "10th percentile of past norms": lambda: with_rule(Quantile()),
    "AGC 0.05": lambda: with_rule(by_unit),
    "alpha = exp(a)": lambda: with_alpha(Exp),
    "alpha = 2 sigmoid(a)": lambda: with_alpha(Bounded),
}


def run(row: str, cell: Cell) -> dict[str, Any]:
    """Train a cell."""
    head = {"row": row, "column": cell.column, "seed": cell.recipe.seed, "settings": dict(cell.settings)}
    return {**head, **asdict(train_cell(cell, 10, 1000, ROWS[row]()))}


def main() -> None:
    """Run what is missing, write the tables."""
    grid = load_grid("ablation")
    plain = [cell for cell in grid.cells if cell.row == "pws"]
    cells = json.loads(FILE.read_text())["cells"] if FILE.is_file() else []
    done = {(cell["row"], cell["column"], cell["seed"]) for cell in cells}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), quiet_lightning) as pool:
        waiting = [(row, c) for c in plain for row in ROWS if (row, c.column, c.recipe.seed) not in done]
        for future in as_completed([pool.submit(run, row, cell) for row, cell in waiting]):
            cells.append(future.result())
            title = grid.title.replace("one setting changed", "another rule for the gradient or form of alpha")
            head = {"grid": "rules", "title": title, "target": grid.target, "rows": list(ROWS), "columns": grid.columns}
            write_result(FILE, "python benchmarks/rules.py", {**head, "cells": cells})
            print(len(cells), {key: cells[-1][key] for key in ("row", "column", "seed", "accuracy", "non_finite_step")})
    FILE.with_suffix(".md").write_text(markdown(json.loads(FILE.read_text())))


if __name__ == "__main__":
    main()
