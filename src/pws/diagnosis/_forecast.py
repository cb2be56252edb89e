"""`pws.forecast`: at which learning rate will training diverge?

The critical learning rate of one step falls short in three ways (docs/theory.md has the numbers), and the forecast answers
each. At initialization the gradient is small by cancellation: the forecast looks at the network after a few warm-up steps.
Gradients that agree over a batch are the dangerous ones: it takes the worst case of the paper's `E[delta] E[xbar]`, an output
gradient that is the same for every sample. What happens next depends on the whole network, for depth multiplies and norms
divide: it takes that step and looks at the gradient that answers.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pws._batch import Forward, Loss, batch_of
from pws._errors import PwsError
from pws._preserve import preserved
from pws.diagnosis._diagnose import bare, check_model
from pws.diagnosis.divergence_probe import DivergenceProbe
from pws.surgery.standardized import to_layers


@dataclass(frozen=True)
class Forecast:
    """The learning rate from which training is expected to diverge."""

    diverging_lr: float
    """The median of `by_pair`."""
    by_pair: tuple[float, ...]
    """The rate from each pair of batches. Their spread says how far to trust them."""
    passes: int
    """The number of forward and backward passes that it took."""


def forecast(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss | None = None,
    *,
    forward: Forward | None = None,
    progress: Callable[[int], None] | None = None,
) -> Forecast:
    """Forecast the learning rate at which SGD with momentum 0.9 diverges, to within a factor of about 3.

        eta* = median over probes of the smallest eta, over both signs of k, with   eta |g(theta - eta k)| >= |theta| / 2

    It works on a copy of the model, whose marked layers become layers that compute their kernel. 12 steps of Adam alternate two
    batches, and a probe follows after 4, 8 and 12 of them. `k` is the gradient on the first batch for an output gradient that
    is the same for each sample: plus and minus the main direction of the actual ones (their first right singular vector), with
    the same energy. `g` is the gradient on the second batch after a step along `k`. In a plain network it grows with eta to the
    power of the depth; behind norms it shrinks. If the model returns losses alone, `k` starts at the outputs of the last layers
    with a weight.

    The model is left exactly as it was. The settings were chosen on 18 networks of 4 to 18 layers on Fashion-MNIST and tried on
    six others (benchmarks/forecast.json). This is a forecast, not a bound.

    Args:
        model: the network before training.
        batches: two training batches of the size to train with, each as `pws.diagnose` takes it. With more pairs (four, six ...
            batches) the median over the pairs is steadier.
        loss: as `pws.diagnose` takes it.
        forward: as `pws.diagnose` takes it.
        progress: called with the number of passes done; each pair takes about 60.

    Raises:
        PwsError: there are fewer than two batches or an odd number. Or no output of the model gets a gradient. Or the loss of a
            batch is not finite.
    """
    if not isinstance(batches, tuple | list) or len(batches) < 2 or len(batches) % 2:
        raise PwsError(
            "forecast needs two training batches or more pairs of them, [(inputs, targets), (inputs, targets)]; got "
            f"{len(batches) if isinstance(batches, tuple | list) else type(batches).__name__}."
        )
    parsed = [batch_of(batch, forward) for batch in batches]
    model = bare(model)
    check_model(model)
    found: list[float] = []
    passes = 0
    with preserved(model), torch.inference_mode(False), torch.enable_grad():
        for first in range(0, len(parsed), 2):
            before = passes

            def report(done: int, before: int = before) -> None:
                if progress is not None:
                    progress(before + done)

            probe = DivergenceProbe(_copy(model), parsed[first : first + 2], loss, report)
            found.append(probe.diverging_lr())
            passes += probe.passes
    return Forecast(statistics.median(found), tuple(found), passes)


def _copy(model: nn.Module) -> nn.Module:
    try:
        copied = copy.deepcopy(model).train()
    except RuntimeError as error:
        raise PwsError(
            f"forecast trains a copy of the model, and it can't be copied: {error}. The old torch.nn.utils.weight_norm "
            "does this: use torch.nn.utils.parametrizations.weight_norm."
        ) from error
    to_layers(copied)
    return copied
