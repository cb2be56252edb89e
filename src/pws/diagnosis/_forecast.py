"""At which learning rate will training diverge? The one-step critical rate made to speak of training.

Three things make the one-step formula fall short (collapse.md in docs has the numbers). At initialization the gradient is small
by cancellation: the forecast looks at the network after a few warm-up steps too. Gradients that agree over a batch are the
dangerous ones: it takes the worst case of the paper's `E[delta] E[xbar]`, an output gradient that is the same for every
sample. And what happens next depends on the whole network (depth multiplies, norms divide): it takes that step and looks at
the gradient that answers.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from pws._errors import PwsError
from pws.diagnosis._diagnose import bare, check_model, loss_of, outputs_of
from pws.diagnosis.batch import Batch, Forward, Loss, batch_of, check_finite, tensors_in
from pws.diagnosis.last_layers import outputs_of_last_layers
from pws.diagnosis.preserve import preserved
from pws.surgery.standardized import to_layers

FEEDBACK: Final = 0.5
"""The answering step, relative to the weights, that counts as divergence: the one fitted number (from 0.3, 0.5 and 1)."""
PROBES: Final = (4, 8, 12)
"""After how many warm-up steps the network is looked at."""
WARM_UP_LR: Final = 3e-3
"""Adam's: it leaves the plateau of the start whatever the size of the gradient."""
PRECISION: Final = 1.15
"""The factor to which each rate is found."""


@dataclass(frozen=True)
class Forecast:
    """The learning rate from which training is expected to diverge."""

    diverging_lr: float
    """The median of `by_pair`."""
    by_pair: tuple[float, ...]
    """From each pair of batches; how far they are apart says how far to trust them."""
    passes: int
    """Forward and backward passes that it took."""


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

    It trains a copy of the model, whose marked layers are made layers that compute their kernel. 12 steps of Adam alternate
    two batches. It probes after 4, 8 and 12 of them. There `k` is the gradient for an output gradient that is the same for
    each sample of the first batch. This is plus and minus the main direction of the actual output gradients (their first
    right singular vector), with the same energy. Where the model returns losses alone, `k` starts at the outputs of the
    last layers with a weight.

    `g` is the gradient on the second batch after a step along `k`. In a plain network it grows with eta to the power of the
    depth. Behind norms it shrinks.

    The model is left exactly as it was. The rule was chosen on 18 networks of 4 to 18 layers on Fashion-MNIST, and tried on
    six others. It is a forecast, not a bound.

    Args:
        model: the network before training.
        batches: two training batches, of the size that will be trained with, each as `pws.diagnose` takes it; or four, six ...:
            the median over the pairs is steadier.
        loss: as `pws.diagnose` takes it.
        forward: as `pws.diagnose` takes it.
        progress: called with the number of passes done; each pair takes about 60.

    Raises:
        PwsError: there are fewer than two batches or an odd number, or no output of the model gets a gradient; or
            the loss of a batch is not finite.
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

            probe = _Probe(_copy(model), parsed[first : first + 2], loss, report)
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


class _Probe:
    """A copy of the model that is warmed up and kicked."""

    def __init__(
        self, model: nn.Module, batches: list[Batch], loss: Loss | None, report: Callable[[int], None]
    ) -> None:
        self.model, self.batches, self.loss, self.report = model, batches, loss, report
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.passes = 0

    def diverging_lr(self) -> float:
        """The median over the probes, at each the lower rate of the two kicks."""
        self.check()
        adam = torch.optim.Adam(self.parameters, lr=WARM_UP_LR)
        found: list[float] = []
        for step in range(max(PROBES) + 1):
            if step in PROBES:
                plus, minus = self.coherent_gradients()
                lr = self.answered_lr(plus, math.inf)
                found.append(min(lr, self.answered_lr(minus, lr)))
            if step < max(PROBES):
                for parameter, gradient in zip(self.parameters, self.gradient(self.batches[step % 2]), strict=True):
                    parameter.grad = gradient
                adam.step()
        return statistics.median(found)

    def check(self) -> None:
        """Raise `PwsError` unless there is a finite loss with a gradient to start from, on each batch."""
        for batch in self.batches:
            value = loss_of(self.loss, batch, outputs_of(self.model, batch))
            if not torch.isfinite(value):
                check_finite(batch.inputs, "input")
                check_finite(batch.targets, "target")
                raise PwsError(
                    f"forecast starts from a finite loss; it is {float(value.detach())} on a batch. pws.diagnose tells why."
                )

    def gradient(self, batch: Batch) -> list[Tensor]:
        """Of the loss by all parameters."""
        self.passes += 1
        self.report(self.passes)
        value = loss_of(self.loss, batch, outputs_of(self.model, batch))
        return list(torch.autograd.grad(value, self.parameters, allow_unused=True, materialize_grads=True))

    def coherent_gradients(self) -> list[list[Tensor]]:
        """The gradients for an output gradient that is the same for each sample: no cancellation over the batch."""
        self.passes += 2
        value, tensors = self.outputs()
        deltas = torch.autograd.grad(value, tensors, retain_graph=True, allow_unused=True, materialize_grads=True)
        main = max(range(len(tensors)), key=lambda i: float(deltas[i].norm()), default=None)
        if main is None or not deltas[main].any():
            raise PwsError(
                "forecast needs an output that gets a gradient from the loss; the model returns none. Likely cause: the loss "
                "is computed from something else than the model's outputs."
            )
        delta_NC = deltas[main].reshape(len(deltas[main]), -1).double()
        if not torch.isfinite(delta_NC).all():
            raise PwsError(
                "forecast needs a finite gradient; that of the model's output is not. `pws.diagnose` tells why."
            )
        direction_C = torch.linalg.svd(delta_NC, full_matrices=False).Vh[0]
        same_NC = (direction_C * (delta_NC.norm() / math.sqrt(len(delta_NC)))).expand_as(delta_NC)
        same = same_NC.reshape(tensors[main].shape).to(tensors[main].dtype)
        found = torch.autograd.grad(tensors[main], self.parameters, same, allow_unused=True, materialize_grads=True)
        return [[g.clone() for g in found], [-g for g in found]]

    def outputs(self) -> tuple[Tensor, list[Tensor]]:
        """The loss on the first batch, and the outputs that it hangs on: the model's, or those of its last layers where it
        returns losses alone."""
        batch = self.batches[0]
        outputs = outputs_of(self.model, batch)
        tensors = [t for t in tensors_in(outputs) if t.requires_grad and t.dim() and t.numel()]
        if tensors:
            return loss_of(self.loss, batch, outputs), tensors
        return outputs_of_last_layers(lambda: loss_of(self.loss, batch, outputs_of(self.model, batch)))

    def answered_lr(self, kick: list[Tensor], ceiling: float) -> float:
        """The smallest rate at which a step along `kick` has an answer of FEEDBACK times the weights, if below `ceiling`."""
        start = [parameter.detach().clone() for parameter in self.parameters]
        size = norm(start)

        def answer(lr: float) -> float:
            with torch.no_grad():
                for parameter, origin, k in zip(self.parameters, start, kick, strict=True):
                    parameter.copy_(origin - lr * k)
            back = lr * norm(self.gradient(self.batches[1])) / (size * FEEDBACK)
            return back if math.isfinite(back) else math.inf

        try:
            return crossing(answer, ceiling)
        finally:
            with torch.no_grad():
                for parameter, origin in zip(self.parameters, start, strict=True):
                    parameter.copy_(origin)


def norm(tensors: Sequence[Tensor]) -> float:
    """Of all tensors as one vector."""
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


def crossing(f: Callable[[float], float], ceiling: float = math.inf) -> float:
    """Where the increasing `f` passes 1, to within PRECISION; infinity if that is above `ceiling` (or 1e4), 0 if below 1e-7."""
    if ceiling <= 0:
        return math.inf
    high = ceiling if math.isfinite(ceiling) else 0.1
    while f(high) < 1:
        high *= 4
        if high > min(ceiling, 1e4):
            return math.inf
    low = high / 4
    while f(low) >= 1:
        low, high = low / 4, low
        if low < 1e-7:
            return 0.0
    while high / low > PRECISION:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if f(middle) >= 1 else (middle, high)
    return math.sqrt(low * high)
