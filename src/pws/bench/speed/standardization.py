"""The standardization alone: checked against float64, then timed beside a copy of the same bytes, the limit of any pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from pws import kernels
from pws.bench.speed.networks import network
from pws.errors import PwsError
from pws.kernels import aten
from pws.kernels.registry import load
from pws.layers import StandardizedLayer

PARITY: Final = 1e-4
"""The largest deviation from float64 allowed, in units of the largest entry."""
C: Final = 0.1
GAMMA: Final = 1e-3


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
    grads = [torch.randn_like(w) for w in weights]
    targets = [torch.empty_like(w) for w in weights]
    passes = {name: _Passes(name, weights, grads) for name in served()}
    taken: dict[str, list[float]] = {
        "copy": [],
        **{f"{name} {way}": [] for name in passes for way in ("forward", "backward")},
    }
    for _ in range(rounds + 1):
        taken["copy"].append(_timed(lambda: [t.copy_(w) for t, w in zip(targets, weights, strict=True)]))
        for name, both in passes.items():
            taken[f"{name} forward"].append(_timed(both.forward))
            taken[f"{name} backward"].append(_timed(both.backward))
    return {
        "bytes": sum(w.numel() * w.element_size() for w in weights),
        "weights": len(weights),
        "deviation": {name: both.deviation for name, both in passes.items()},
        "seconds": {name: values[1:] for name, values in taken.items()},  # the first round warms up
    }


class _Passes:
    """The weights through one backend."""

    def __init__(self, name: str, weights: list[Tensor], grads: list[Tensor]) -> None:
        self.backend, self.weights, self.grads = load(name), weights, grads
        self.alphas = [torch.linspace(0.5, 1.5, len(w), device=w.device) for w in weights]
        self.outputs = self.forward()
        self.deviation = max(map(self._deviation, range(len(weights))))
        if not self.deviation < PARITY:
            raise PwsError(
                f"the kernel backend {name} deviates from float64 by {self.deviation:.1e} of the largest entry, and "
                f"{PARITY:g} is allowed: its times would mean nothing. Run tests/test_kernels.py here, and report what it says."
            )

    def forward(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        pairs = zip(self.weights, self.alphas, strict=True)
        return [self.backend.forward(w, a, C, GAMMA, torch.float32) for w, a in pairs]

    def backward(self) -> list[tuple[Tensor, Tensor]]:
        everything = zip(self.grads, self.weights, self.alphas, self.outputs, strict=True)
        return [self.backend.backward(g, w, a, mean, rstd, C) for g, w, a, (_, mean, rstd) in everything]

    def _deviation(self, i: int) -> float:
        w, a, g = self.weights[i], self.alphas[i], self.grads[i]
        kernel, mean, rstd = self.outputs[i]
        found = [kernel, *self.backend.backward(g, w, a, mean, rstd, C)]
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
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
