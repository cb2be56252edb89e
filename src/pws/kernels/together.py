"""The kernels of many layers in one go, for the forward pass that follows.

On a GPU the standardization of a layer takes a few microseconds, and Python takes a hundred times that to ask for it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pws.kernels.autocast import result_dtype
from pws.kernels.backend import Backend, Job, Plan
from pws.kernels.operators import gradients
from pws.kernels.registry import choose
from pws.kernels.rows import order_of, rows_of, unrolled


class Prepared:
    """A kernel computed for the forward pass that is going on."""

    __slots__ = ("_alpha", "_circumstances", "_versions", "_weight", "kernel")

    def __init__(self, kernel: Tensor, weight: Tensor, alpha: Tensor, circumstances: tuple[Any, ...]) -> None:
        self.kernel = kernel
        self._weight, self._alpha, self._circumstances = weight, alpha, circumstances
        self._versions = (weight._version, alpha._version)

    def serves(self, parameters: Mapping[str, Tensor | None]) -> bool:
        """Whether a layer of `parameters` would compute just this kernel now."""
        weight, alpha = parameters["weight"], parameters["alpha"]
        return (
            weight is self._weight
            and alpha is self._alpha
            and self._versions == (self._weight._version, self._alpha._version)
            and self._circumstances == _circumstances(self._weight)
        )


def prepare(plan: Plan, weights: Sequence[Tensor], alphas: Sequence[Tensor]) -> list[Prepared]:
    """The kernels of `weights` and `alphas`, which lie where `plan` says."""
    circumstances = _circumstances(weights[0])
    kernels = _Together.apply(plan, result_dtype(weights[0]), *weights, *alphas)
    return [Prepared(*three, circumstances) for three in zip(kernels, weights, alphas, strict=True)]


def plan_for(jobs: Sequence[Job]) -> Plan:
    """A plan of the backend in use."""
    backend = choose(rows_of(jobs[0].weight, order_of(jobs[0].weight)))
    return backend.plan(jobs) if backend.plan else LayerByLayer(jobs, backend)


def _circumstances(weight: Tensor) -> tuple[Any, ...]:
    """What has to be the same for a prepared kernel to serve, beside values: the thread, whose graph it is in; whether
    gradients flow; who packs saved tensors, for what checkpointing computes again must be computed inside its region; and the
    dtype."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return threading.get_ident(), torch.is_grad_enabled(), hooks, result_dtype(weight)


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        kernels, saved = plan.forward(dtype)
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        ctx.save_for_backward(*tensors, *saved)
        return tuple(kernels)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        n, plan = 2 * len(grads), ctx.plan
        tensors, saved = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        if torch.is_grad_enabled():  # the gradients are to be differentiated again, in operators that have a derivative
            plan, saved = LayerByLayer(_moved(plan.jobs, tensors)), [None] * n
        elif not plan.is_for(tensors):
            plan = plan_for(_moved(plan.jobs, tensors))
        of_weights, of_alphas = plan.backward(grads, saved)
        return None, None, *of_weights, *of_alphas


def _moved(jobs: Sequence[Job], tensors: Sequence[Tensor]) -> list[Job]:
    """The jobs, for these weights and alphas."""
    n = len(jobs)
    return [Job(w, a, *job[2:]) for job, w, a in zip(jobs, tensors[:n], tensors[n:], strict=True)]


class LayerByLayer:
    """For backends that know one layer at a time."""

    def __init__(self, jobs: Sequence[Job], backend: Backend | None = None) -> None:
        self.jobs = jobs
        self._backend = backend
        self._orders = [order_of(job.weight) for job in jobs]

    def forward(self, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """See `Plan`; saves the means of all layers, then their reciprocal roots."""
        assert self._backend
        kernels, means, rstds = [], [], []
        for job, order in zip(self.jobs, self._orders, strict=True):
            rows_OK = rows_of(job.weight, order)
            kernel_OK, mean_O, rstd_O = self._backend.forward(rows_OK, job.alpha, job.c, job.gamma, dtype)
            kernels.append(unrolled(kernel_OK, job.weight.shape, order))
            means.append(mean_O)
            rstds.append(rstd_O)
        return kernels, means + rstds

    def backward(
        self, grads: Sequence[Tensor | None], saved: Sequence[Any]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """See `Plan`."""
        n = len(self.jobs)
        of_weights: list[Tensor | None] = [None] * n
        of_alphas: list[Tensor | None] = [None] * n
        for i, grad in enumerate(grads):
            if grad is not None:
                (weight, alpha, *constants), order = self.jobs[i], self._orders[i]
                rows = (rows_of(grad, order), rows_of(weight, order), alpha, saved[i], saved[n + i], *constants)
                of_rows, of_alphas[i] = gradients(self._backend and self._backend.backward, *rows)
                of_weights[i] = unrolled(of_rows, weight.shape, order)
        return of_weights, of_alphas

    def is_for(self, tensors: Sequence[Tensor]) -> bool:
        """See `Plan`."""
        mine = [*(job.weight for job in self.jobs), *(job.alpha for job in self.jobs)]
        return all(one is other for one, other in zip(tensors, mine, strict=True))
