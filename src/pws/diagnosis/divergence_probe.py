"""The experiment behind a forecast: warm a network up, kick it, and look at the gradient that answers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from pws._batch import Batch, Loss, check_finite, tensors_in
from pws._errors import PwsError
from pws.diagnosis._diagnose import loss_of, outputs_of
from pws.diagnosis.recording.weighted_operation import Call, Operations

FEEDBACK: Final = 0.5
"""The answering step, relative to the weights, that counts as divergence: the one fitted number (from 0.3, 0.5 and 1)."""
PROBES: Final = (4, 8, 12)
"""After how many warm-up steps the network is looked at."""
WARM_UP_LR: Final = 3e-3
"""The rate of Adam, which leaves the plateau of the start whatever the size of the gradient."""
PRECISION: Final = 1.15
"""The factor to which each rate is found."""


class DivergenceProbe:
    """A copy of the model that is warmed up and kicked."""

    def __init__(
        self, model: nn.Module, batches: list[Batch], loss: Loss | None, report: Callable[[int], None]
    ) -> None:
        self.model, self.batches, self.loss, self.report = model, batches, loss, report
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.passes = 0

    def diverging_lr(self) -> float:
        """Return the median over the probes, of the lower rate of the two kicks at each."""
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
        """Return the gradient of the loss by all parameters."""
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
    """The norm of all tensors as one vector."""
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


def crossing(f: Callable[[float], float], ceiling: float = math.inf) -> float:
    """Find where the increasing `f` passes 1, to within PRECISION.

    The result is infinity if that is above `ceiling` (or 1e4), and 0 if it is below 1e-7.
    """
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


def outputs_of_last_layers(run: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The loss that `run` computes, and the outputs of the last layers with a weight: no other follows them."""
    outputs: list[Tensor] = []

    def keep(call: Call) -> Tensor:
        outputs.append(call.run())
        return outputs[-1].clone()  # which an activation may overwrite

    with Operations(keep):
        loss = run()
    found = _first_met(loss.grad_fn, {output.grad_fn for output in outputs if output.grad_fn is not None})
    return loss, [output for output in outputs if output.grad_fn in found and output.numel()]


def _first_met(start: Any, wanted: set[Any]) -> set[Any]:
    """Those of the `wanted` nodes of a graph that are met first on the ways back from `start`."""
    found, seen, ahead = set(), set(), [start]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in wanted:
            found.add(node)
        else:
            ahead.extend(following for following, _ in node.next_functions)
    return found
