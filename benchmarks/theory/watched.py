"""The nine-convolution network trained under a monitor, with one method at one learning rate after the other."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean
from typing import Any, Final

import torch
from torch.nn import functional as F

from benchmarks.experiment import Say
from benchmarks.theory.centring import method_of
from benchmarks.theory.divergence import MOMENTUM, Network, prepare, sgd_of
from pws.bench.result_file import rounded
from pws.diagnosis import CollapseWarning, Diagnosis, Monitor
from pws.optim import NonFiniteGradientError

WIDTH: Final = 0.25
BATCH_SIZE: Final = 64
SMOOTHED_OVER: Final = 10
MOST_POINTS: Final = 60
"""The most points of a loss curve in a result file, beside the first `SMOOTHED_OVER`, where it moves most."""
Curve = list[tuple[int, float]]
"""Step and value."""


@dataclass(frozen=True)
class WatchedRun:
    """A network trained for some steps."""

    method: str
    lr: float
    losses: list[float | None]
    """The loss of each step; None where not finite."""
    diagnoses: list[Diagnosis]
    verdict: str
    collapsed_at: int | None
    """The step of the first unhealthy diagnosis."""

    @property
    def finite(self) -> list[float]:
        """The losses before the first that is not finite."""
        end = self.non_finite_step
        return [loss for loss in self.losses[:end] if loss is not None]

    @property
    def non_finite_step(self) -> int | None:
        """The step of the first loss that is not finite."""
        return self.losses.index(None) if None in self.losses else None

    def to_dict(self) -> dict[str, Any]:
        """How the run ended, as plain values."""
        return {
            **{"method": self.method, "lr": self.lr, "steps": len(self.losses)},
            **{"collapsed_at": self.collapsed_at, "non_finite_step": self.non_finite_step},
            "final_loss": rounded(fmean(self.finite[-20:]), 4) if self.finite else None,
            "verdict": self.verdict,
        }

    def loss_curve(self) -> Curve:
        """Running means of the losses: the first ones, then at most `MOST_POINTS` at equal distances."""
        losses = self.finite
        means = [fmean(losses[max(0, i + 1 - SMOOTHED_OVER) : i + 1]) for i in range(len(losses))]
        every = max(1, math.ceil(len(means) / MOST_POINTS))
        last = len(means) - 1
        kept = [step for step in range(len(means)) if step < SMOOTHED_OVER or (last - step) % every == 0]
        return [(step, rounded(means[step], 4)) for step in kept]


def train_all(chosen: Sequence[tuple[str, float]], steps: int, every: int, quick: bool, say: Say) -> list[WatchedRun]:
    """Train a network for each method and learning rate, and say how it ended."""
    runs = []
    for method, lr in chosen:
        run = train_watched(method, lr, min(steps, 8) if quick else steps, every, dataset_of(quick))
        told = run.to_dict()
        ended = f"loss {told['final_loss']:.3g}" if run.non_finite_step is None else "non-finite"
        say(f"{method}, LR {lr:g}: {ended} after {len(run.losses)} steps. {run.verdict}")
        runs.append(run)
    return runs


def dataset_of(quick: bool) -> str:
    """What the networks are trained on."""
    return "digits" if quick else "fashion-mnist"


def train_watched(method: str, lr: float, steps: int, every: int, dataset: str = "fashion-mnist") -> WatchedRun:
    """Train with `method` (see `method_of`) under a monitor that measures at least one step in `every`."""
    chosen = method_of(method)
    model, loader = prepare(Network("allconv", method, WIDTH, BATCH_SIZE), dataset, method=chosen)
    sgd = sgd_of(model, lr, chosen.step_bound)
    losses: list[float | None] = []
    with warnings.catch_warnings(), Monitor(model, every, lr=lr, momentum=MOMENTUM, optimizer=sgd) as monitor:
        warnings.simplefilter("ignore", CollapseWarning)  # the run says so
        for images, labels in islice(loader, steps):
            loss = monitor.observe(F.cross_entropy(model(images), labels))
            losses.append(_finite(float(loss.detach())))
            if losses[-1] is None:
                break
            sgd.zero_grad()
            torch.autograd.backward(loss)
            try:
                sgd.step()
            except NonFiniteGradientError:
                losses.append(None)
                break
    unhealthy = monitor.first_unhealthy
    verdict = str(monitor.verdict)
    return WatchedRun(method, lr, losses, monitor.history, verdict, None if unhealthy is None else unhealthy.step)


def finite_variances(diagnosis: Diagnosis) -> list[float | None]:
    """The variance of each layer's output; None where it overflows."""
    return [_finite(rounded(layer.output.variance, 4)) for layer in diagnosis.layers]


def shift_shares(diagnoses: Sequence[Diagnosis]) -> Iterator[tuple[int, float]]:
    """Step and mean shift share of the inner layers.

    The first layer sees one image channel and the head a few features: both have large shares from the start.
    """
    for diagnosis in diagnoses:
        finite = [share for layer in diagnosis.layers[1:-1] if math.isfinite(share := layer.shift_share)]
        if finite:
            yield diagnosis.step or 0, rounded(fmean(finite), 4)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
