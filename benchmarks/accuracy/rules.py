"""Other ways to hold PWS at large learning rates, in the cells of the grid `ablation`.

What else was tried for the bound on the step, and other forms of alpha. In the layer form: its weights and its alpha are
parameters, with gradients of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import torch
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from benchmarks.accuracy.shipped import shipped_grid
from pws.bench.cell import train_cell
from pws.bench.cell_result import CellResult
from pws.bench.grid import Cell, Grid
from pws.methods import Method, build_method
from pws.surgery.standardized import to_layers


def weights_of(optimizer: Optimizer) -> list[tuple[nn.Parameter, Tensor, float]]:
    """Parameter, gradient and largest learning rate."""
    groups = optimizer.param_groups
    return [(p, p.grad, group["initial_lr"]) for group in groups for p in group["params"] if p.grad is not None]


def each_tensor(model: nn.Module, optimizer: Optimizer) -> None:
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


def in_layer_form(change: Callable[[nn.Module], nn.Module]) -> Method:
    """PWS whose layers are pws layers, each given to `change`."""
    method = build_method("pws")

    def changed(layer: nn.Module) -> nn.Module:
        to_layers(layer)
        return change(layer)

    def conv(*sizes: Any, **settings: Any) -> nn.Module:
        return changed(method.conv(*sizes, **settings))

    return replace(method, conv=conv, head=lambda *sizes: changed(method.head(*sizes)))


def with_alpha(form: Callable[[], nn.Module]) -> Method:
    """PWS with another form of alpha."""
    return in_layer_form(lambda layer: parametrize.register_parametrization(layer, "alpha", form()))


def with_rule(rule: Any) -> Method:
    """PWS with another rule for the gradients in place of the bound."""
    return replace(in_layer_form(lambda layer: layer), gradients=rule, step_bound=None)


ROWS: Final[dict[str, Callable[[], Method]]] = {
    "the whole step at most 0.1": lambda: with_rule(all_together),
    "the whole step at most 0.1 at the rate of the moment": lambda: with_rule(present_rate),
    "each tensor's step at most 0.02": lambda: with_rule(each_tensor),
    "each tensor's step at most 1 % of it": lambda: with_rule(relative),
    "10th percentile of past norms": lambda: with_rule(Quantile()),
    "AGC 0.05": lambda: with_rule(by_unit),
    "alpha = exp(a)": lambda: with_alpha(Exp),
    "alpha = 2 sigmoid(a)": lambda: with_alpha(Bounded),
}


def rules_grid() -> Grid:
    """The columns of the grid `ablation`, with a row per rule."""
    grid = shipped_grid("ablation")
    return replace(
        grid,
        path=grid.path.with_stem("rules"),
        title=grid.title.replace("one setting changed", "another rule for the gradient or form of alpha"),
        rows={row: {"model.method": "pws"} for row in ROWS},
        seeds=dict.fromkeys(ROWS, grid.seeds["pws"]),
    )


def train_by_rule(cell: Cell, evaluations: int, evaluation_images: int) -> CellResult:
    """Train a cell with the method of its row."""
    return train_cell(cell, evaluations, evaluation_images, ROWS[cell.row]())
