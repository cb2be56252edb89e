"""The experiments behind the paper's argument, on Fashion-MNIST: each trains a few networks under a monitor.

shift: the filters' means take over none and wn, not bn and pws.
centred: what BatchNorm's backward pass does, E[delta] = 0, given to Weight Normalization.
depth: the variance along the depth, before and after five steps.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pws.bench.divergence import MOMENTUM, Network, prepare, sgd_of
from pws.diagnosis import CollapseWarning, Diagnosis, Monitor
from pws.methods import Method, build_method
from pws.optim import NonFiniteGradientError

WIDTH: Final = 0.25
BATCH_SIZE: Final = 64
BACKWARD_CENTRED: Final = "wn, gradient centred"
OUTPUT_CENTRED: Final = "wn, output centred"


class _CentreGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, signal: Tensor) -> Tensor:
        return signal.view_as(signal)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient - gradient.mean([d for d in range(gradient.dim()) if d != 1], keepdim=True)


class CentreGradient(nn.Module):
    """Nothing forward; backward the output gradient less its mean over each channel: `E[delta] = 0`, as behind BatchNorm."""

    def forward(self, signal: Tensor) -> Tensor:
        """The signal."""
        centred: Tensor = _CentreGradient.apply(signal)
        return centred


class CentreOutput(nn.Module):
    """The output less its mean over each channel, plus a bias: BatchNorm without the division (Salimans and Kingma 2016,
    "mean-only"). Its backward pass is `CentreGradient`'s, and it is the gradient of what runs forward."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, signal: Tensor) -> Tensor:
        """The centred signal."""
        return signal - signal.mean([0, 2, 3], keepdim=True) + self.bias[:, None, None]


def method_of(name: str) -> Method:
    """A registered method, or Weight Normalization with `E[delta] = 0`, which it lacks of BatchNorm by the paper's argument."""
    if name == BACKWARD_CENTRED:
        return replace(build_method("wn"), name=name, norm=lambda _: CentreGradient())
    if name == OUTPUT_CENTRED:
        return replace(build_method("wn"), name=name, norm=CentreOutput)
    return build_method(name)


@dataclass(frozen=True)
class Run:
    """A network trained for some steps."""

    method: str
    lr: float
    losses: list[float | None]
    """Of each step; None where not finite."""
    diagnoses: list[Diagnosis]
    verdict: str
    collapsed_at: int | None
    """The step of the first unhealthy diagnosis."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the losses, and the variances and shift shares of each measured step."""
        rows = [
            {
                "step": diagnosis.step,
                "output_variance": [_finite(layer.output.variance) for layer in diagnosis.layers],
                "shift_share": [_finite(layer.shift_share) for layer in diagnosis.layers],
            }
            for diagnosis in self.diagnoses
        ]
        names = [layer.name for layer in self.diagnoses[0].layers]
        head = {"method": self.method, "lr": self.lr, "collapsed_at": self.collapsed_at, "verdict": self.verdict}
        return {**head, "layers": names, "losses": self.losses, "measured": rows}


def train_watched(method: str, lr: float, steps: int, every: int, dataset: str = "fashion-mnist") -> Run:
    """Train the 9-convolution network with `method` (see `method_of`) under a monitor."""
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
    return Run(method, lr, losses, monitor.history, verdict, None if unhealthy is None else unhealthy.step)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


SHIFT_RUNS: Final = tuple((method, 0.3) for method in ("none", "wn", "bn", "pws"))
CENTRED_METHODS: Final = ("wn", BACKWARD_CENTRED, OUTPUT_CENTRED, "bn")
CENTRED_RUNS: Final = tuple((method, lr) for lr in (0.05, 0.3) for method in CENTRED_METHODS)
DEPTH_RUNS: Final = tuple((method, 0.3) for method in ("none", "wn", "bn", "pws"))
