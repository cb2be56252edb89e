"""At which learning rate a network really diverges: by bisection, training it for 200 steps at each rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from pws._mark import marked
from pws.methods import Method, build_method
from pws.models import build_model
from pws.optim import SGD, NonFiniteGradientError
from pws.training.data import ImageData
from pws.training.guessing import GUESSING_LOSS
from pws.training.recipe import DataConfig

MOMENTUM: Final = 0.9


@dataclass(frozen=True)
class Network:
    """One network of the comparison."""

    model: str
    method: str
    width: float
    batch_size: int
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = "".join(f", {key} {value:.3g}" for key, value in self.options.items())
        return f"{self.model} {self.method}{options}, width {self.width:g}, batch {self.batch_size}"


def prepare(
    network: Network, dataset: str = "fashion-mnist", seed: int = 0, method: Method | None = None
) -> tuple[nn.Module, DataLoader[tuple[Tensor, Tensor]]]:
    """The network at initialization and a loader of its batches; `method` replaces the registered one."""
    side = 16 if dataset == "digits" else None  # allconv needs 12 pixels, the digits have 8
    config = DataConfig(name=dataset, batch_size=network.batch_size, image_size=side, validation=0)
    data = ImageData(config, seed)
    seed_everything(seed, workers=True, verbose=False)
    images, _ = data.splits.test.get([0])
    model = build_model(
        network.model,
        method or build_method(network.method, **network.options),
        in_channels=images.shape[1],
        num_classes=len(data.splits.classes),
        width=network.width,
    )
    return model.to(memory_format=torch.channels_last), data.train_dataloader()


def sgd_of(model: nn.Module, lr: float, step_bound: float | None = None) -> torch.optim.Optimizer:
    """SGD with momentum 0.9: of `pws.optim` if layers are marked, with a bound on each layer's step; torch's for others."""
    if marked(model):
        return SGD(model, lr=lr, momentum=MOMENTUM, step_bound=step_bound)
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM)


def diverges(network: Network, lr: float, steps: int = 200, **where: Any) -> bool:
    """Whether SGD with momentum 0.9 at `lr`, without a bound, ends with a loss that is not finite or no better than a guess.

    A gradient that is not finite counts as such a loss, which it leads to. The second is judged by the mean loss of the last
    tenth of the steps.
    """
    model, loader = prepare(network, **where)
    sgd = sgd_of(model, lr)
    losses: list[float] = []
    while len(losses) < steps:
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                return True
            sgd.zero_grad()
            torch.autograd.backward(loss)
            try:
                sgd.step()
            except NonFiniteGradientError:
                return True
            if len(losses) == steps:
                break
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last) > GUESSING_LOSS


def smallest_diverging_lr(
    probe: Callable[[float], bool], start: float = 0.1, ratio: float = 1.2
) -> tuple[float, dict[float, bool]]:
    """The rate at which `probe` turns true, to within `ratio`: the geometric middle of the last bracket.

    Also every rate probed with its answer. From `start` the bracket grows by factors of 4, up to 1e4 and down to 1e-5.
    """
    probed: dict[float, bool] = {}

    def ask(lr: float) -> bool:
        probed[lr] = probe(lr)
        return probed[lr]

    lr = start
    bad = ask(lr)
    while 1e-5 < lr < 1e4:
        following = lr / 4 if bad else lr * 4
        lr = following
        if ask(lr) != bad:
            break
    else:
        return (math.inf if not bad else 0.0), probed
    low, high = (lr, lr * 4) if bad else (lr / 4, lr)
    while high / low > ratio:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if ask(middle) else (middle, high)
    return (low * high) ** 0.5, probed
