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
from pws.kernels.rows import is_dense, order_of, rows_of, unrolled


class Prepared:
    """A kernel computed for the forward pass that is going on."""

    __slots__ = ("_alpha", "_circumstances", "_state", "_weight", "kernel")

    def __init__(self, kernel: Tensor, weight: Tensor, alpha: Tensor, circumstances: tuple[Any, ...]) -> None:
        self.kernel = kernel
        self._weight, self._alpha, self._circumstances = weight, alpha, circumstances
        self._state = _state(weight, alpha)

    def serves(self, parameters: Mapping[str, Tensor | None]) -> bool:
        """Whether a layer of `parameters` would compute just this kernel now."""
        weight, alpha = parameters.get("weight"), parameters.get("alpha")
        return (
            weight is self._weight
            and alpha is self._alpha
            and self._state == _state(self._weight, self._alpha)
            and self._circumstances == _circumstances(self._weight)
        )

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of a layer, made during a pass, is not in that pass


def prepare(plan: Plan, weights: Sequence[Tensor], alphas: Sequence[Tensor]) -> list[Prepared]:
    """The kernels of `weights` and `alphas`, which lie where those lay that `plan` was made for."""
    circumstances = _circumstances(weights[0])
    kernels = _Together.apply(plan, result_dtype(weights[0]), *weights, *alphas)
    return [Prepared(*three, circumstances) for three in zip(kernels, weights, alphas, strict=True)]


def plan_for(jobs: Sequence[Job]) -> Plan:
    """A plan of the backend in use."""
    backend = choose(rows_of(jobs[0].weight, order_of(jobs[0].weight)))
    return backend.plan(jobs) if backend.plan else LayerByLayer(jobs, backend)


def can_be_planned(weight: Tensor, alpha: Tensor) -> bool:
    """Whether these are what a job wants."""
    return (
        is_dense(weight)
        and weight.numel() > 0
        and alpha.is_contiguous()
        and alpha.shape == weight.shape[:1]
        and (alpha.device, alpha.dtype) == (weight.device, weight.dtype)
    )


def _state(weight: Tensor, alpha: Tensor) -> tuple[int, ...]:
    """What changes with the values, but for changes in place of `.data`, which torch does not count."""
    return weight._version, alpha._version, weight.data_ptr(), alpha.data_ptr()


def _circumstances(weight: Tensor) -> tuple[Any, ...]:
    """What has to be the same for a prepared kernel to serve, beside values: the thread, whose graph it is in; the stream,
    which has it in its order; whether gradients flow; who packs saved tensors, for what checkpointing computes again must be
    computed inside its region; and the dtype."""
    stream = torch._C._cuda_getCurrentRawStream(weight.get_device()) if weight.is_cuda else None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return threading.get_ident(), stream, torch.is_grad_enabled(), hooks, result_dtype(weight)


class _Together(torch.autograd.Function):
    """One node of the graph for layers that know nothing of each other: what one does must not be an error of another's. So
    nothing is saved by torch, which would check all weights for changes, and free all statistics, when the first gradients
    are taken."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        kernels, ctx.statistics = plan.forward(tensors, dtype)
        needed = ctx.needs_input_grad[2:]
        pairs = zip(needed[: len(kernels)], needed[len(kernels) :], strict=True)
        ctx.mark_non_differentiable(*(k for k, pair in zip(kernels, pairs, strict=True) if not any(pair)))
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.tensors, ctx.versions = plan, tensors, [t._version for t in tensors]
        return tuple(kernels)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        n, plan, statistics = len(grads), ctx.plan, ctx.statistics
        if all(grad is None for grad in grads):
            return None, None, *[None] * (2 * n)
        changed = [version != t._version for t, version in zip(ctx.tensors, ctx.versions, strict=True)]
        if any(grad is not None and (changed[i] or changed[n + i]) for i, grad in enumerate(grads)):
            raise RuntimeError(
                "a weight or an alpha was modified by an inplace operation between the forward pass, which standardized it, "
                "and the backward pass, which needs it as it was. Take the step after the backward pass."
            )
        if torch.is_grad_enabled():  # the gradients are to be differentiated again, in operators that have a derivative
            constants = plan.constants
            jobs = [Job(w, a, *both) for w, a, both in zip(ctx.tensors[:n], ctx.tensors[n:], constants, strict=True)]
            plan, statistics = LayerByLayer(jobs), [None] * (2 * n)
        of_weights, of_alphas = plan.backward(grads, ctx.tensors, statistics)
        return None, None, *of_weights, *of_alphas


class LayerByLayer:
    """For backends that know one layer at a time."""

    def __init__(self, jobs: Sequence[Job], backend: Backend | None = None) -> None:
        self.constants = [job[2:] for job in jobs]
        self._backend = backend
        self._orders = [order_of(job.weight) for job in jobs]

    def forward(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """See `Plan`; the statistics are the means of all layers, then their reciprocal roots."""
        assert self._backend
        kernels, means, rstds = [], [], []
        n = len(self._orders)
        for weight, alpha, both, order in zip(tensors[:n], tensors[n:], self.constants, self._orders, strict=True):
            kernel_OK, mean_O, rstd_O = self._backend.forward(rows_of(weight, order), alpha, *both, dtype)
            kernels.append(unrolled(kernel_OK, weight.shape, order))
            means.append(mean_O)
            rstds.append(rstd_O)
        return kernels, means + rstds

    def backward(
        self, grads: Sequence[Tensor | None], tensors: Sequence[Tensor], statistics: Sequence[Any]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """See `Plan`."""
        n = len(grads)
        of_weights: list[Tensor | None] = [None] * n
        of_alphas: list[Tensor | None] = [None] * n
        for i, grad in enumerate(grads):
            if grad is not None:
                weight, alpha, order = tensors[i], tensors[n + i], self._orders[i]
                rows = (rows_of(weight, order), alpha, statistics[i], statistics[n + i], *self.constants[i])
                backward = self._backend and self._backend.backward
                of_rows, of_alphas[i] = gradients(backward, rows_of(grad, order), *rows)
                of_weights[i] = unrolled(of_rows, weight.shape, order)
        return of_weights, of_alphas
