"""Parametric Weights Standardization of one weight: the maths, with its analytic backward.

Shape letters: O filters (output channels), K entries of a filter (the fan-in n).
Source: Liu, Ge, Li, Gui, "Delving into Variance Transmission and Normalization", AAAI 2021 (arXiv 2103.11590).
We differ in one place: the constant c is `gain / sqrt(fan_in)` with any gain, not `sqrt(2 / fan)` alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pws.errors import PwsError, ShapeError
from pws.gain import resolve_gain


def standardize(
    weight: Tensor,
    alpha: Tensor | None = None,
    *,
    gain: float | str = "relu",
    gamma: float = 1e-3,
    relative_gamma: bool = False,
) -> Tensor:
    """The kernel that convolves: every filter centred, divided by its deviation, scaled by alpha.

        kernel_o = gain / sqrt(n) * alpha_o * (w_o - m_o) / sqrt(v_o + gamma)

    A filter is a slice of the leading dimension; `n`, `m_o` and `v_o` (biased) are its size, mean and variance.
    The gradient of the weight has zero mean in every filter, so no step can shift a filter.

    Args:
        weight: `(out_channels, ...)`, at least two entries a filter.
        alpha: `(out_channels,)`, the scale of each filter; 1 if left out.
        gain: `c * sqrt(n)`, a number or the name of the activation in front of the layer, whose gain then preserves
            variance (`pws.variance_preserving_gain`).
        gamma: added to the variance inside the root, in units of weight squared; it bounds the gradient of small filters.
        relative_gamma: add `gamma * 2 / n` instead, so that its weight beside a Kaiming filter's variance `2 / n` is the
            same in layers of every size.

    Returns:
        A tensor of the weight's shape and memory format, in the weight's dtype, or autocast's where that is enabled.
        Statistics are taken in float32 (float64 for a float64 weight) whatever the weight's dtype.

    Raises:
        ShapeError: a filter has fewer than two entries, or alpha does not hold one number a filter.
        PwsError: gamma is negative, gain is not positive, or the weight is of integers.

    Examples:
        >>> kernel = standardize(torch.tensor([[1.0, 3.0], [5.0, 4.0]]), gain=2**0.5, gamma=0.0)
        >>> kernel.round(decimals=4)
        tensor([[-1.,  1.],
                [ 1., -1.]])
    """
    fan_in = check_fan_in(weight)
    if not weight.is_floating_point():
        raise PwsError(
            f"Only floating-point weights have a standardized kernel; got {weight.dtype}. Convert with .float()."
        )
    if alpha is not None and alpha.shape != weight.shape[:1]:
        raise ShapeError(
            f"alpha holds one scale a filter, shape ({weight.shape[0]},) for a weight of shape {tuple(weight.shape)}; "
            f"got {tuple(alpha.shape)}. Pass alpha.flatten() if it comes from a checkpoint with trailing ones."
        )
    check_gamma(gamma)
    c = resolve_gain(gain) * fan_in**-0.5
    eps = gamma * 2 / fan_in if relative_gamma else gamma
    order = _memory_order(weight)
    flat_OK = weight.permute(order).reshape(weight.shape[0], fan_in)
    kernel_OK: Tensor = _Standardize.apply(flat_OK, alpha, c, eps, _result_dtype(weight))[0]
    inverse = [order.index(d) for d in range(weight.dim())]
    return kernel_OK.reshape([weight.shape[d] for d in order]).permute(inverse)


def check_fan_in(weight: Tensor) -> int:
    """The fan-in of `weight`, the entries of one filter; raise `ShapeError` unless there are at least two."""
    fan_in = weight.shape[1:].numel() if weight.dim() > 1 else weight.dim()
    if fan_in < 2:
        raise ShapeError(
            f"Weight standardization needs a fan-in of at least 2; got a weight of shape {tuple(weight.shape)} "
            f"= (out_channels, ...), fan-in {fan_in}. A single number has no variance. A depthwise 1x1 convolution, or "
            "1x1 from one channel, does this: use the plain torch.nn layer there."
        )
    return fan_in


def check_gamma(gamma: float) -> None:
    """Raise `PwsError` unless gamma can stand inside the root."""
    if not 0 <= gamma < float("inf"):
        raise PwsError(f"gamma is added to a variance and must be finite and at least 0; got {gamma!r}. Usual: 1e-3.")


def _memory_order(weight: Tensor) -> list[int]:
    # Flattening in the order of memory is a view for every dense layout (channels_last too), and keeps that layout in
    # the result; the statistics of a filter do not care about the order of its entries.
    return [0, *sorted(range(1, weight.dim()), key=weight.stride, reverse=True)]


def _result_dtype(weight: Tensor) -> torch.dtype:
    # Autocast leaves float64 alone, and so do we.
    device = weight.device.type
    if weight.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return weight.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _statistics(weight_OK: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Mean `(O, 1)` and reciprocal root `1 / sqrt(v + gamma)` `(O, 1)`; two passes, so a large mean costs no digits."""
    mean_O1 = weight_OK.mean(1, keepdim=True)
    variance_O1 = (weight_OK - mean_O1).square().mean(1, keepdim=True)
    return mean_O1, (variance_O1 + gamma).rsqrt()


class _Standardize(torch.autograd.Function):
    """`kernel = c alpha h`, `h = (w - m) / sqrt(v + gamma)`, with the gradients of paper section 2."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight_OK: Tensor, alpha_O: Tensor | None, c: float, gamma: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide_OK = _widen(weight_OK)
        mean_O1, rstd_O1 = _statistics(wide_OK, gamma)
        scale_O1 = rstd_O1 * c if alpha_O is None else rstd_O1 * (c * alpha_O.to(wide_OK.dtype)[:, None])
        return ((wide_OK - mean_O1) * scale_O1).to(dtype), mean_O1, rstd_O1

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        weight_OK, alpha_O, ctx.c, ctx.gamma, _ = inputs
        _, mean_O1, rstd_O1 = output
        ctx.mark_non_differentiable(mean_O1, rstd_O1)
        ctx.save_for_backward(weight_OK, alpha_O, mean_O1, rstd_O1)

    @staticmethod
    def backward(ctx: Any, grad_OK: Tensor, *_: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        weight_OK, alpha_O, mean_O1, rstd_O1 = ctx.saved_tensors
        wide_OK, g_OK = _widen(weight_OK), grad_OK.to(mean_O1.dtype)
        if torch.is_grad_enabled():  # a second derivative is wanted: the saved statistics would be constants to it
            mean_O1, rstd_O1 = _statistics(wide_OK, ctx.gamma)
        h_OK = (wide_OK - mean_O1) * rstd_O1
        along_O1 = (g_OK * h_OK).mean(1, keepdim=True)
        grad_alpha_O, scale_O1 = None, ctx.c * rstd_O1
        if alpha_O is not None:
            grad_alpha_O = (along_O1[:, 0] * (ctx.c * weight_OK.shape[1])).to(alpha_O.dtype)
            scale_O1 = scale_O1 * alpha_O.to(rstd_O1.dtype)[:, None]
        grad_weight_OK = scale_O1 * (g_OK - g_OK.mean(1, keepdim=True) - h_OK * along_O1)
        return grad_weight_OK.to(weight_OK.dtype), grad_alpha_O, None, None, None


def _widen(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
