"""The kernels of many layers in one go, before the forward pass that uses them.

On a GPU a small layer's standardization takes a few microseconds, and Python takes twenty times that to launch it. In one go it
is one launch for all layers, and one Python call. What `prepare` computed serves the calls of `kernel_of` that ask for just
that, in the same thread, until `forget`; any other call computes for itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pws.kernels.backend import Backend, Job
from pws.kernels.observed import is_observed
from pws.kernels.operators import gradients
from pws.kernels.registry import choose
from pws.kernels.rows import order_of, rows_of, unrolled


class _Prepared(NamedTuple):
    job: Job
    state: tuple[Any, ...]
    kernel: Tensor


class _Thread(threading.local):
    """What is prepared, by the weight's id: kept alive by its job, so the id is its own."""

    def __init__(self) -> None:
        self.kernels: dict[int, _Prepared] = {}


_here = _Thread()


def prepare(jobs: Sequence[Job], dtype: torch.dtype) -> None:
    """Compute the kernels of `jobs`, of one device and one dtype of weights, for `take`; nothing where somebody wants to see
    each operator."""
    if any(map(is_observed, (tensor for job in jobs for tensor in job[:2] if tensor is not None))):
        return
    weights, alphas = [job.weight for job in jobs], [job.alpha for job in jobs]
    kernels = _Together.apply([job[2:] for job in jobs], dtype, *weights, *alphas)
    for job, kernel in zip(jobs, kernels, strict=True):
        _here.kernels[id(job.weight)] = _Prepared(job, _state(job.weight, job.alpha), kernel)


def forget(weights: Iterable[Tensor]) -> None:
    """Let go of what `prepare` computed."""
    for weight in weights:
        _here.kernels.pop(id(weight), None)


def take(weight: Tensor, alpha_O: Tensor | None, c: float, gamma: float, dtype: torch.dtype) -> Tensor | None:
    """The prepared kernel for this call; None if there is none."""
    if not _here.kernels or id(weight) not in _here.kernels:
        return None
    job, state, kernel = _here.kernels[id(weight)]
    asked = job.alpha is alpha_O and job[2:] == (c, gamma) and kernel.dtype == dtype
    return kernel if asked and state == _state(weight, alpha_O) else None


def _state(*tensors: Tensor | None) -> tuple[Any, ...]:
    """What has to be the same for a prepared kernel to serve: the values; whether gradients flow; and who packs saved tensors,
    for what checkpointing computes again must be computed inside its region."""
    versions = [None if t is None or t.is_inference() else t._version for t in tensors]
    return (*versions, torch.is_grad_enabled(), torch._C._autograd._top_saved_tensors_default_hooks(True))


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, settings: list[tuple[float, float]], dtype: torch.dtype, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        jobs = _jobs(tensors, settings)
        backend = choose(rows_of(jobs[0].weight, order_of(jobs[0].weight)))
        kernels, saved = (backend.forward_together or _Each(backend).forward)(jobs, dtype)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.settings = backend, settings
        ctx.save_for_backward(*tensors, *saved)
        return tuple(kernels)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        tensors, saved = ctx.saved_tensors[: 2 * len(grads)], ctx.saved_tensors[2 * len(grads) :]
        jobs = _jobs(tensors, ctx.settings)
        backend: Backend = ctx.backend
        backward = backend.backward_together or _Each(backend).backward
        if torch.is_grad_enabled():  # the gradients are to be differentiated again, which needs no statistics
            backward, saved = _Each(backend).backward, [None] * (2 * len(grads))
        found = [pair or (None, None) for pair in backward(grads, jobs, saved)]
        return None, None, *(of_weight for of_weight, _ in found), *(of_alpha for _, of_alpha in found)


def _jobs(tensors: Sequence[Any], settings: Sequence[tuple[float, float]]) -> list[Job]:
    n = len(settings)
    return [Job(w, a, *both) for w, a, both in zip(tensors[:n], tensors[n:], settings, strict=True)]


class _Each:
    """A backend that knows one layer at a time."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def forward(self, jobs: Sequence[Job], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """`ForwardTogether`; saves the means of all layers, then their reciprocal roots."""
        orders = [order_of(job.weight) for job in jobs]
        outputs = [
            self.backend.forward(rows_of(job.weight, order), *job[1:], dtype)
            for job, order in zip(jobs, orders, strict=True)
        ]
        kernels = [unrolled(out[0], job.weight.shape, o) for out, job, o in zip(outputs, jobs, orders, strict=True)]
        return kernels, [statistic for i in (1, 2) for statistic in (out[i] for out in outputs)]

    def backward(
        self, grads: Sequence[Tensor | None], jobs: Sequence[Job], saved: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor | None] | None]:
        """`BackwardTogether`."""
        n = len(jobs)
        found: list[tuple[Tensor, Tensor | None] | None] = []
        for grad, job, mean_O, rstd_O in zip(grads, jobs, saved[:n], saved[n:], strict=True):
            if grad is None:
                found.append(None)
                continue
            order = order_of(job.weight)
            rows = (rows_of(job.weight, order), job.alpha, mean_O, rstd_O, job.c, job.gamma)
            of_weight, of_alpha = gradients(self.backend.backward, rows_of(grad, order), *rows)
            found.append((unrolled(of_weight, job.weight.shape, order), of_alpha))
        return found
