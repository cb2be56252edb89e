"""The standardization alone: checked against float64, then timed beside torch's copy of the same bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from pws import kernels
from pws.bench.speed.networks import network
from pws.errors import PwsError
from pws.kernels import aten
from pws.kernels.backend import Backend, Job, Plan
from pws.kernels.registry import load
from pws.layers import StandardizedLayer

PARITY: Final = 1e-4
"""The largest deviation from float64 allowed, in units of the largest entry."""
C: Final = 0.1
GAMMA: Final = 1e-3
CACHES: Final = 2**30
"""Bytes, several times what a GPU's caches hold."""
AHEAD: Final = 20_000_000
"""Cycles of a GPU, about ten milliseconds."""


def served() -> list[str]:
    """The backends that serve float32 weights on this machine's device."""
    weight = torch.ones(2, 2, device=_device())
    return [name for name in kernels.installed() if load(name).refusal(weight) is None]


def standardization_alone(model: str, width: float, rounds: int) -> dict[str, Any]:
    """All kernels of a network: deviation from float64, and seconds of each round, forward, backward and copied.

    Raises:
        PwsError: a backend deviates: then nothing of it is worth timing.
    """
    torch.manual_seed(0)
    weights = [w.to(_device()) for w in _weights(network(model, "pws", width))]
    work = _Work(weights, [torch.randn_like(w) for w in weights])
    targets = [torch.empty_like(w) for w in weights]
    ways: dict[str, Callable[[], Any]] = {"copy": lambda: torch._foreach_copy_(targets, weights)}
    deviation = {}
    everything = _passes(work)
    for name, passes in everything.items():
        deviation[name] = _deviation(name, passes, work)
        ways[f"{name} forward"], ways[f"{name} backward"] = passes.forward, passes.backward
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds + 1):
        for passes in everything.values():
            passes.refresh()
        for way, run in ways.items():
            taken[way].append(_timed(run))
    return {
        "bytes": sum(w.numel() * w.element_size() for w in weights),
        "weights": len(weights),
        "deviation": deviation,
        "seconds": {name: values[1:] for name, values in taken.items()},  # the first round warms up
    }


class _Work:
    """What is to be standardized."""

    def __init__(self, weights: list[Tensor], grads: list[Tensor]) -> None:
        self.weights, self.grads = weights, grads
        self.alphas = [torch.linspace(0.5, 1.5, len(w), device=w.device) for w in weights]


class _Passes(Protocol):
    """The weights through one backend, there and back."""

    @property
    def kernels(self) -> Sequence[Tensor]:
        """What the first forward pass gave."""

    def refresh(self) -> None:
        """Bring back the gradients that a backward pass has written over; not timed."""

    def forward(self) -> Any:
        """All kernels."""

    def backward(self) -> list[Any]:
        """All gradients, of weight and alpha."""


def _passes(work: _Work) -> dict[str, _Passes]:
    found: dict[str, _Passes] = {}
    for name in served():
        backend = load(name)
        found[name] = _LayerByLayer(backend, work)
        if backend.plan:
            found[f"{name} together"] = _Together(backend.plan, work)
    return found


class _LayerByLayer:
    def __init__(self, backend: Backend, work: _Work) -> None:
        self.backend, self.work = backend, work
        self.outputs = self.forward()
        self.kernels = [kernel for kernel, _, _ in self.outputs]
        # As in training, where nobody needs the kernels' gradients any more.
        self.run_backward = backend.overwriting or backend.backward
        self.grads = [grad.clone() for grad in work.grads] if backend.overwriting else work.grads

    def refresh(self) -> None:
        if self.backend.overwriting:
            torch._foreach_copy_(self.grads, self.work.grads)

    def forward(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        pairs = zip(self.work.weights, self.work.alphas, strict=True)
        return [self.backend.forward(w, a, C, GAMMA, torch.float32) for w, a in pairs]

    def backward(self) -> list[Any]:
        everything = zip(self.grads, self.work.weights, self.work.alphas, self.outputs, strict=True)
        return [self.run_backward(g, w, a, mean, rstd, C) for g, w, a, (_, mean, rstd) in everything]


class _Together:
    def __init__(self, plan: type[Plan], work: _Work) -> None:
        self.plan = plan([Job(w, a, C, GAMMA) for w, a in zip(work.weights, work.alphas, strict=True)])
        self.work = work
        self.kernels, self.saved = self.forward()

    def refresh(self) -> None:
        pass

    def forward(self) -> Any:
        return self.plan.forward((*self.work.weights, *self.work.alphas), torch.float32)

    def backward(self) -> list[Any]:
        tensors = (*self.work.weights, *self.work.alphas)
        return list(zip(*self.plan.backward(self.work.grads, tensors, self.saved), strict=True))


def _deviation(name: str, passes: _Passes, work: _Work) -> float:
    """The largest, in units of each tensor's largest entry."""
    found = zip(passes.kernels, passes.backward(), work.weights, work.alphas, work.grads, strict=True)
    largest = max(_deviation_of((kernel, *grads), w, a, g) for kernel, grads, w, a, g in found)
    if not largest < PARITY:
        raise PwsError(
            f"the kernel backend {name} deviates from float64 by {largest:.1e} of the largest entry, and "
            f"{PARITY:g} is allowed: its times would mean nothing. Run tests/test_kernels.py here, and report what it says."
        )
    return largest


def _deviation_of(found: tuple[Tensor, ...], w: Tensor, a: Tensor, g: Tensor) -> float:
    w, a, g = w.double(), a.double(), g.double()
    kernel, mean, rstd = aten.forward(w, a, C, GAMMA, torch.float64)
    expected = [kernel, *aten.backward(g, w, a, mean, rstd, C)]
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(found, expected, strict=True))


def _weights(model: nn.Module) -> list[Tensor]:
    layers = [module for module in model.modules() if isinstance(module, StandardizedLayer)]
    return [layer.weight.detach().flatten(1) for layer in layers]


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
