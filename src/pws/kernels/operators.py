"""The standardization as operators of torch, `pws::standardize` and `pws::standardize_backward`, over the backend in use.

Filters are independent, so a batch of weights is a weight of more filters: that is all that vmap needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pws.kernels import aten
from pws.kernels.registry import choose

Outputs = tuple[Tensor, Tensor, Tensor]
Dims = tuple[int | None, ...]


@torch.library.custom_op("pws::standardize", mutates_args=())
def standardize_rows(weight_OK: Tensor, alpha_O: Tensor | None, c: float, gamma: float, dtype: torch.dtype) -> Outputs:
    """Kernel `(O, K)`, means `(O,)` and reciprocal roots `(O,)` of the rows of a weight."""
    return choose(weight_OK).forward(weight_OK, alpha_O, c, gamma, dtype)


@torch.library.custom_op("pws::standardize_backward", mutates_args=())
def standardize_rows_backward(
    grad_OK: Tensor, weight_OK: Tensor, alpha_O: Tensor | None, mean_O: Tensor, rstd_O: Tensor, c: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight and of alpha."""
    return choose(weight_OK).backward(grad_OK, weight_OK, alpha_O, mean_O, rstd_O, c)


@standardize_rows.register_fake
def _(weight_OK: Tensor, alpha_O: Tensor | None, c: float, gamma: float, dtype: torch.dtype) -> Outputs:
    wide = torch.promote_types(weight_OK.dtype, torch.float32)
    row_O = weight_OK.new_empty(weight_OK.shape[:1], dtype=wide)
    return weight_OK.new_empty(weight_OK.shape, dtype=dtype), row_O, torch.empty_like(row_O)


@standardize_rows_backward.register_fake
def _(
    grad_OK: Tensor, weight_OK: Tensor, alpha_O: Tensor | None, mean_O: Tensor, rstd_O: Tensor, c: float
) -> tuple[Tensor, Tensor]:
    return weight_OK.new_empty(weight_OK.shape), torch.empty_like(rstd_O)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    weight_OK, alpha_O, ctx.c, ctx.gamma, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(weight_OK, alpha_O, *output[1:])


def _backward(ctx: Any, grad_OK: Tensor, *_: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
    weight_OK, alpha_O, mean_O, rstd_O = ctx.saved_tensors
    rows = (weight_OK, alpha_O, mean_O, rstd_O, ctx.c, ctx.gamma)
    return *gradients(standardize_rows_backward, grad_OK, *rows), None, None, None


def gradients(
    backward: Any,
    grad_OK: Tensor,
    weight_OK: Tensor,
    alpha_O: Tensor | None,
    mean_O: Tensor,
    rstd_O: Tensor,
    c: float,
    gamma: float,
) -> tuple[Tensor, Tensor | None]:
    """Of the weight and of alpha, by `backward` unless they are to be differentiated again."""
    if torch.is_grad_enabled():  # through operators that have a derivative, statistics included
        mean_O, rstd_O = aten.statistics(weight_OK, gamma)
        backward = aten.backward
    grad_weight_OK, grad_alpha_O = backward(grad_OK, weight_OK, alpha_O, mean_O, rstd_O, c)
    return grad_weight_OK, None if alpha_O is None else grad_alpha_O.to(alpha_O.dtype)


standardize_rows.register_autograd(_backward, setup_context=_setup_context)


class Standardize(torch.autograd.Function):
    """The operator for torch.func too, whose transforms do not take an operator's registered autograd."""

    generate_vmap_rule = True
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)

    @staticmethod
    def forward(weight_OK: Tensor, alpha_O: Tensor | None, c: float, gamma: float, dtype: torch.dtype) -> Outputs:
        """`standardize_rows`."""
        outputs: Outputs = standardize_rows(weight_OK, alpha_O, c, gamma, dtype)
        return outputs


@standardize_rows.register_vmap
def _(info: Any, dims: Dims, weight: Tensor, alpha: Tensor | None, *settings: Any) -> tuple[Any, Any]:
    rows = _Batch(info.batch_size)
    outputs = standardize_rows(rows.merge(weight, dims[0]), rows.merge(alpha, dims[1]), *settings)
    return tuple(map(rows.split, outputs)), (0, 0, 0)


@standardize_rows_backward.register_vmap
def _(info: Any, dims: Dims, *arguments: Any) -> tuple[Any, Any]:
    rows = _Batch(info.batch_size)
    *tensors, c = arguments
    outputs = standardize_rows_backward(*map(rows.merge, tensors, dims), c)
    return tuple(map(rows.split, outputs)), (0, 0)


class _Batch:
    """A batch of `size` weights as the rows of one, and back."""

    def __init__(self, size: int) -> None:
        self.size = size

    def merge(self, tensor: Tensor | None, dim: int | None) -> Tensor | None:
        if tensor is None:
            return None
        batch = tensor.expand(self.size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return batch.flatten(0, 1)

    def split(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.size, -1, *tensor.shape[1:])
