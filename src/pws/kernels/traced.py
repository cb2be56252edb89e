"""Many layers together, for a compiler: two operators that it calls, where it would launch a kernel a layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from pws.kernels.backend import Job
from pws.kernels.observed import captures, stream
from pws.kernels.together import LayerByLayer, can_be_planned
from pws.kernels.triton import TRITON
from pws.kernels.triton_together import INTERPRETED, TYPES, TritonPlan

MOST_PLANS: Final = 16

_library = torch.library.Library("pws", "FRAGMENT")
_arguments = "Tensor[] weights, Tensor[] alphas, float[] c, float[] gamma"
_tags = (torch.Tag.cudagraph_unsafe,)  # they upload addresses: a compiler leaves them out of its CUDA graphs
_library.define(f"standardize_together({_arguments}, ScalarType dtype) -> (Tensor[], Tensor, Tensor)", tags=_tags)
_library.define(
    f"standardize_together_backward(Tensor[] grads, {_arguments}, Tensor mean, Tensor rstd) -> (Tensor[], Tensor)",
    tags=_tags,
)
_plans: OrderedDict[tuple[Any, ...], TritonPlan] = OrderedDict()
Tensors = list[Tensor]


def _forward(
    weights: Tensors, alphas: Tensors, c: list[float], gamma: list[float], dtype: torch.dtype
) -> tuple[Tensors, Tensor, Tensor]:
    if captures():
        kernels, saved = LayerByLayer(_jobs(weights, alphas, c, gamma), TRITON).forward((*weights, *alphas), dtype)
        return kernels, torch.cat(saved[: len(c)]), torch.cat(saved[len(c) :])
    kernels, (mean, rstd) = _plan(weights, alphas, c, gamma).forward((*weights, *alphas), dtype)
    return kernels, mean, rstd


def _backward(
    grads: Tensors,
    weights: Tensors,
    alphas: Tensors,
    c: list[float],
    gamma: list[float],
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Sequence[Any], Tensor]:
    if captures():
        filters = [len(w) for w in weights]
        saved = (*mean.split_with_sizes(filters), *rstd.split_with_sizes(filters))
        plan = LayerByLayer(_jobs(weights, alphas, c, gamma), TRITON)
        of_weights, of_alphas = plan.backward(grads, (*weights, *alphas), saved)
        return of_weights, torch.cat([of_alpha for of_alpha in of_alphas if of_alpha is not None])
    return _plan(weights, alphas, c, gamma).gradients(grads, (mean, rstd))


def _plan(weights: Tensors, alphas: Tensors, c: list[float], gamma: list[float]) -> TritonPlan:
    """The plan for tensors that lie just there, of the last few."""
    key = (stream(), *[(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in (*weights, *alphas)], *c, *gamma)
    found = _plans.get(key)
    if found is None:
        found = _plans[key] = TritonPlan(_jobs(weights, alphas, c, gamma))
        if len(_plans) > MOST_PLANS:
            _plans.popitem(last=False)
    return found


def _jobs(*columns: Sequence[Any]) -> list[Job]:
    return [Job(w.detach(), a.detach(), *constants) for w, a, *constants in zip(*columns, strict=True)]


def _fake_forward(weights: Tensors, alphas: Tensors, *others: Any) -> tuple[Tensors, Tensor, Tensor]:
    *_, dtype = others
    mean = weights[0].new_empty(sum(len(w) for w in weights), dtype=torch.float32)
    return [torch.empty_like(w, dtype=dtype) for w in weights], mean, torch.empty_like(mean)


def _fake_backward(grads: Tensors, weights: Tensors, alphas: Tensors, *_: Any) -> tuple[Tensors, Tensor]:
    return [torch.empty_like(w) for w in weights], alphas[0].new_empty(sum(len(a) for a in alphas))


for _name, _operator, _fake in (
    ("standardize_together", _forward, _fake_forward),
    ("standardize_together_backward", _backward, _fake_backward),
):
    _library.impl(_name, _operator, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pws::{_name}", _fake, lib=_library)


def serves(weights: Sequence[Any], alphas: Sequence[Any]) -> bool:
    """Whether these can be standardized together: all on one GPU, of one dtype, as a plan wants them."""
    first = weights[0]
    return (INTERPRETED or first.is_cuda) and all(
        (w.device, w.dtype) == (first.device, first.dtype) and w.dtype in TYPES and can_be_planned(w, a)
        for w, a in zip(weights, alphas, strict=True)
    )


class Traced(torch.autograd.Function):
    """The kernels of weights, then alphas."""

    @staticmethod
    def forward(
        ctx: Any, c: list[float], gamma: list[float], dtype: torch.dtype, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """`kernel = c alpha h`, `h = (w - m) / sqrt(v + gamma)`."""
        weights, alphas = list(tensors[: len(c)]), list(tensors[len(c) :])
        kernels, mean, rstd = torch.ops.pws.standardize_together(weights, alphas, c, gamma, dtype)
        ctx.save_for_backward(*tensors, mean, rstd)
        ctx.c, ctx.gamma = c, gamma
        return tuple(kernels)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """`dw = c alpha / sqrt(v + gamma) (g - mean(g) - h mean(g h))`, `dalpha = c sum(g h)`."""
        *tensors, mean, rstd = ctx.saved_tensors
        weights, alphas = list(tensors[: len(ctx.c)]), list(tensors[len(ctx.c) :])
        of_weights, of_alphas = torch.ops.pws.standardize_together_backward(
            list(grads), weights, alphas, ctx.c, ctx.gamma, mean, rstd
        )
        return None, None, None, *of_weights, *torch.split(of_alphas, [len(a) for a in alphas])
