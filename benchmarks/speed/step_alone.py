"""The optimizer's step alone: checked against float64, then timed beside torch's SGD and a copy of the same bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

import pws
from benchmarks.speed.networks import LR, MOMENTUM, network
from pws._errors import PwsError
from pws._mark import Mark, adopt, mark_of
from pws.bench.result_file import rounded
from pws.bench.timing import quartiles

STREAMS: Final = {"copy": 2, "torch SGD": 8, "torch SGD, fused": 5, "pws SGD": 8}
"""How often each reads or writes all weights. torch's SGD as it comes takes three operators, with momentum and without decay.
That of pws reads gradient and `w`, then gradient, `w` and momentum, and writes `w`, momentum and kernel."""
PARITY: Final = 1e-4
"""The largest deviation from float64 allowed, in units of the largest change of a tensor."""
CHECKED_LR: Final = 0.1
"""At which the step is checked: it moves weights far beyond their rounding, which a small one does not."""
CHECKED_BOUND: Final = 1.0
"""At which the step is checked, beside none: layers of more than a hundred weights reach it."""
CACHES: Final = 2**30
"""Bytes, several times what a GPU's caches hold."""
AHEAD: Final = 20_000_000
"""Cycles of a GPU, about ten milliseconds."""


def step_alone(model: str, width: float, rounds: int) -> dict[str, Any]:
    """All weights of a network: deviation from float64, and the time of each step and of a copy, in seconds and in copies.

    Raises:
        PwsError: the step deviates: then it is not worth timing.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    built = network(model, "pws", width).to(device)
    for parameter in built.parameters():
        parameter.grad = torch.randn_like(parameter)
    deviation = max(_deviation(built, bound) for bound in (CHECKED_BOUND, None))
    if not deviation < PARITY:
        raise PwsError(
            f"the step deviates from float64 by {deviation:.1e} of the largest change, and {PARITY:g} is allowed: its times "
            "would mean nothing. Run the project's tests here, and report what they say."
        )
    weights = [parameter.detach() for parameter in built.parameters()]
    targets = [torch.empty_like(weight) for weight in weights]
    ways: dict[str, Callable[[], Any]] = {
        "copy": lambda: torch._foreach_copy_(targets, weights),
        "torch SGD": torch.optim.SGD(_copies(built), lr=LR, momentum=MOMENTUM).step,
        "torch SGD, fused": torch.optim.SGD(_copies(built), lr=LR, momentum=MOMENTUM, fused=True).step,
        "pws SGD": pws.optim.SGD(built, lr=LR, momentum=MOMENTUM).step,
    }
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds + 1):
        for way, run in ways.items():
            taken[way].append(_timed(run))
    return {
        "bytes": sum(weight.numel() * weight.element_size() for weight in weights),
        "deviation": rounded(deviation),
        "rounds": rounds,
        "ways": ways_of({name: values[1:] for name, values in taken.items()}),  # the first round warms up
    }


def ways_of(taken: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Each way's streams, the median of its seconds, and the quartiles of its ratio to a copy in the same round."""
    return {
        name: {
            "streams": STREAMS[name],
            "seconds": rounded(statistics.median(seconds)),
            "copies": quartiles(tuple(seconds), tuple(taken["copy"])),
        }
        for name, seconds in taken.items()
    }


def _copies(model: nn.Module) -> list[Tensor]:
    """The parameters in memory of their own, with the same gradients."""
    copies: list[Tensor] = []
    for parameter in model.parameters():
        copies.append(nn.Parameter(parameter.detach().clone()))
        copies[-1].grad = parameter.grad
    return copies


def _deviation(model: nn.Module, bound: float | None) -> float:
    """The largest of two steps of a model from float64, in units of each tensor's largest change."""
    layers = [(module, mark) for module in model.modules() if (mark := mark_of(module)) is not None]
    starts = [{name: p.detach().double() for name, p in layer.named_parameters()} for layer, _ in layers]
    optimizer = pws.optim.SGD(model, lr=CHECKED_LR, momentum=MOMENTUM, step_bound=bound)
    for _ in range(2):
        optimizer.step()
    found = []
    for (layer, mark), start in zip(layers, starts, strict=True):
        grads = {name: p.grad.double() for name, p in layer.named_parameters() if p.grad is not None}
        expected = _two_steps(start, grads, mark, bound)
        for name, parameter in layer.named_parameters():
            change = (expected[name] - start[name]).abs().max()
            found.append(float((parameter.detach() - expected[name]).abs().max() / change))
    return max(found)


def _two_steps(
    start: dict[str, Tensor], grads: dict[str, Tensor], mark: Mark, bound: float | None
) -> dict[str, Tensor]:
    """A layer's weight and bias after two steps by autograd through `pws.standardize` and torch's SGD, in float64."""
    w, alpha = (latent.requires_grad_() for latent in adopt(start["weight"], mark))
    rest = {name: nn.Parameter(tensor.clone()) for name, tensor in start.items() if name != "weight"}
    moved = [w, alpha, *rest.values()]
    optimizer = torch.optim.SGD(moved, lr=CHECKED_LR, momentum=MOMENTUM)

    def kernel() -> Tensor:
        return pws.standardize(w, alpha, gain=mark.gain, gamma=mark.gamma, relative_gamma=mark.relative_gamma)

    for _ in range(2):
        found = [*torch.autograd.grad(kernel(), (w, alpha), grads["weight"]), *(grads[name] for name in rest)]
        length = CHECKED_LR * torch.stack([gradient.square().sum() for gradient in found]).sum().sqrt()
        for tensor, gradient in zip(moved, found, strict=True):
            tensor.grad = gradient if bound is None else gradient * (bound / length).clamp(max=1)
        optimizer.step()
    return {"weight": kernel().detach(), **{name: tensor.detach() for name, tensor in rest.items()}}


def _timed(run: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        return _timed_on_gpu(run)
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _timed_on_gpu(run: Callable[[], Any]) -> float:
    """Between two events on the device, with cold caches. What the host takes shows in a step's time, not here."""
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.empty(CACHES, dtype=torch.int8, device="cuda").zero_()
    torch.cuda._sleep(AHEAD)  # while the host asks for all that is timed
    started.record()
    run()
    ended.record()
    torch.cuda.synchronize()
    return float(started.elapsed_time(ended)) / 1e3
