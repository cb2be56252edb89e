"""The kernel of a weight by the shortest way that the circumstances allow.

In a training step each layer's Python runs with cold caches: an operator of torch written in Python then costs half a
millisecond, ten times what it costs in a loop, and more than the standardization of most layers. So plain tensors go to the
backend directly; the operator serves whoever has to see it: transforms of torch.func, tracers and other dispatch modes, and
subclasses of Tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pws.kernels import aten
from pws.kernels.backend import Backend
from pws.kernels.observed import is_plain, somebody_observes
from pws.kernels.operators import Standardize, gradients
from pws.kernels.owners import SOLE, owners
from pws.kernels.registry import choose
from pws.kernels.rows import order_of, rows_of, unrolled


def kernel_of(weight: Tensor, alpha_O: Tensor | None, c: float, gamma: float, dtype: torch.dtype) -> Tensor:
    """The kernel of a weight `(O, ...)`, in its shape and memory format."""
    if torch.compiler.is_compiling():
        # A compiler fuses stock operators with what stands around them; an operator of ours it could only call.
        return aten.composed(weight, alpha_O, c, gamma, dtype)
    order = order_of(weight)
    if somebody_observes() or not (is_plain(weight) and is_plain(alpha_O)):
        rows_OK: Tensor = Standardize.apply(rows_of(weight, order), alpha_O, c, gamma, dtype)[0]
        return unrolled(rows_OK, weight.shape, order)
    direct: Callable[..., Tensor] = _Direct.apply
    return direct(weight, alpha_O, c, gamma, dtype, order)


class _Direct(torch.autograd.Function):
    """`Standardize` with nothing between autograd and the backend."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        alpha_O: Tensor | None,
        c: float,
        gamma: float,
        dtype: torch.dtype,
        order: list[int] | None,
    ) -> Tensor:
        weight_OK = rows_of(weight, order)
        backend = choose(weight_OK)
        kernel_OK, mean_O, rstd_O = backend.forward(weight_OK, alpha_O, c, gamma, dtype)
        ctx.backend, ctx.c, ctx.gamma, ctx.order = backend, c, gamma, order
        ctx.save_for_backward(weight, alpha_O, mean_O, rstd_O)
        return unrolled(kernel_OK, weight.shape, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        weight, alpha_O, mean_O, rstd_O = ctx.saved_tensors
        backend: Backend = ctx.backend
        backward = backend.backward
        if backend.overwriting is not None and SOLE is not None and owners(grad) == SOLE:
            backward = backend.overwriting
        rows = (rows_of(weight, ctx.order), alpha_O, mean_O, rstd_O, ctx.c, ctx.gamma)
        grad_weight_OK, grad_alpha_O = gradients(backward, rows_of(grad, ctx.order), *rows)
        return unrolled(grad_weight_OK, weight.shape, ctx.order), grad_alpha_O, None, None, None, None
