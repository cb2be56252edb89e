"""Parametric Weights Standardization of one weight, by torch's own batch norm.

Shape letters: O filters (output channels), K entries of a filter (the fan-in n).
Source: Liu, Ge, Li, Gui, "Delving into Variance Transmission and Normalization", AAAI 2021 (arXiv 2103.11590).
We differ in one place: the constant c is `gain / sqrt(fan_in)` with any gain, not `sqrt(2 / fan)` alone.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from pws._errors import PwsError, ShapeError
from pws._gain import resolve_gain

LARGE: Final = 1e12
"""Entries up to this have squares, and sums of squares, far from the end of float32."""
# Asked once: torch.compile of torch 2.11 can't trace the question, and would compile each layer's call on its own.
_AUTOCAST_DEVICES: Final = frozenset(
    device for device in ("cpu", "cuda", "mps", "xpu", "hpu", "xla", "mtia") if torch.amp.is_autocast_available(device)
)


def standardize(
    weight: Tensor,
    alpha: Tensor | None = None,
    *,
    gain: float | str = "relu",
    gamma: float = 1e-3,
    relative_gamma: bool = False,
) -> Tensor:
    """Make the kernel that convolves: every filter centred, divided by its deviation, scaled by alpha.

        kernel_o = gain / sqrt(n) * alpha_o * (w_o - m_o) / sqrt(v_o + gamma)

    A filter is a slice of the leading dimension; `n`, `m_o` and `v_o` (biased) are its size, mean and variance.
    The gradient of the weight has zero mean in every filter, so no step can shift a filter.

    Args:
        weight: `(out_channels, ...)`, at least two entries per filter.
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
        ShapeError: a filter has fewer than two entries, or alpha does not hold one number per filter.
        PwsError: gamma is negative, gain is not positive, the weight is of integers or alpha of complex numbers, or the two are
            on different devices.

    Examples:
        >>> import torch
        >>> kernel = standardize(torch.tensor([[1.0, 3.0], [5.0, 4.0]]), gain=2**0.5, gamma=0.0)
        >>> kernel.round(decimals=4)
        tensor([[-1.,  1.],
                [ 1., -1.]])
    """
    check_fan_in(weight)
    if not weight.is_floating_point():
        raise PwsError(
            f"Only floating-point weights have a standardized kernel; got {weight.dtype}. Convert with .float()."
        )
    if alpha is not None and alpha.shape != weight.shape[:1]:
        raise ShapeError(
            f"alpha holds one scale per filter, shape ({weight.shape[0]},) for a weight of shape {tuple(weight.shape)}; "
            f"got {tuple(alpha.shape)}. Pass alpha.flatten() if it comes from a checkpoint with trailing ones."
        )
    check_gamma(gamma)
    return scaled(_within_range(weight), alpha, resolve_gain(gain), gamma, relative_gamma)


def _within_range(weight: Tensor) -> Tensor:
    """A weight whose squares overflow, made small: its kernel is the same, for gamma is nothing beside such a variance."""
    if torch.promote_types(weight.dtype, torch.float32) != torch.float32 or not weight.numel():
        return weight
    dims = tuple(range(1, weight.dim()))
    largest = weight.detach().abs().amax(dims, keepdim=True).float()
    return weight * (LARGE / largest).clamp(max=1.0).to(weight.dtype)


def scaled(weight: Tensor, alpha: Tensor | None, gain: float, gamma: float, relative_gamma: bool) -> Tensor:
    """`standardize` of arguments that are known to be right."""
    return wide_kernel(weight, alpha, gain, gamma, relative_gamma).to(result_dtype(weight))


def wide_kernel(weight: Tensor, alpha: Tensor | None, gain: float, gamma: float, relative_gamma: bool) -> Tensor:
    """`scaled` in float32 at least, whatever autocast says."""
    _check_alike(weight, alpha)
    c, gamma = constants(weight, gain, gamma, relative_gamma)
    # In float32 at least: half-precision statistics would overflow.
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scale_O = wide.new_full(wide.shape[:1], c) if alpha is None else c * alpha.to(wide.dtype)
    # Torch's batch norm refuses zero channels.
    form = _composed if torch.compiler.is_compiling() or not len(weight) else _batch_normed
    return form(wide, scale_O, gamma)


def _check_alike(weight: Tensor, alpha: Tensor | None) -> None:
    """Raise `PwsError` unless both are real and on one device."""
    if weight.is_complex() or (alpha is not None and alpha.is_complex()):
        which = "weights" if weight.is_complex() else "alpha"
        raise PwsError(
            f"a kernel is made of real weights and real scales; {which} is complex. Take the real part or the size."
        )
    if alpha is not None and alpha.device != weight.device:
        raise PwsError(
            f"a weight and its alpha must be on one device; the weight is on {weight.device}, alpha on {alpha.device}. Move "
            "the whole layer: layer.to(device)."
        )


def _batch_normed(weight: Tensor, scale_O: Tensor, gamma: float) -> Tensor:
    """The kernel as batch norm of one sample, whose channels are the filters and whose positions are their entries."""
    if not weight.is_contiguous():
        # Statistics do not care about the order of entries. The memory's order needs no copy, and the kernel keeps it.
        order = [0, *sorted(range(1, weight.dim()), key=weight.stride, reverse=True)]
        kernel = _batch_normed(weight.permute(order).contiguous(), scale_O, gamma)
        return kernel.permute([order.index(dim) for dim in range(len(order))])
    rows_1OK = weight.view(1, len(weight), weight.shape[1:].numel())
    if weight.device.type != "cpu":  # to look at a value would wait for the device
        return torch.batch_norm(rows_1OK, scale_O, None, None, None, True, 0.0, gamma, False).view(weight.shape)
    kernel_1OK, _, inverse_O = torch.native_batch_norm(rows_1OK, scale_O, None, None, None, True, 0.0, gamma)
    if not _all_positive(inverse_O):  # a variance overflowed
        rows_1OK = _within_range(weight).view(rows_1OK.shape)
        kernel_1OK = torch.batch_norm(rows_1OK, scale_O, None, None, None, True, 0.0, gamma, False)
    return kernel_1OK.view(weight.shape)


def _all_positive(values: Tensor) -> bool:
    """Whether they are; False too where they can't be looked at, inside `torch.func.vmap` or without data."""
    try:
        return bool((values > 0).all())
    except RuntimeError:
        return False


def _composed(weight: Tensor, scale_O: Tensor, gamma: float) -> Tensor:
    """The kernel for a compiler to fuse: in the weight's own shape, so that it can be written in the layout that the
    convolution asks for. Rows in between would be copied, each way."""
    h = torch.nn.functional.layer_norm(_within_range(weight), weight.shape[1:], None, None, gamma)
    return h * scale_O.view(-1, *[1] * (weight.dim() - 1))


def result_dtype(weight: Tensor) -> torch.dtype:
    """Autocast's dtype where that is enabled, else the weight's. Autocast leaves float64 alone, and so do we."""
    device = weight.device.type
    if weight.dtype == torch.float64 or device not in _AUTOCAST_DEVICES:
        return weight.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def constants(weight: Tensor, gain: float, gamma: float, relative_gamma: bool) -> tuple[float, float]:
    """The factor `c` of a kernel, and what is added to the variance."""
    fan_in = weight.shape[1:].numel()
    return gain * fan_in**-0.5, gamma * 2 / fan_in if relative_gamma else gamma


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


def swap_channels(weight: Tensor, groups: int) -> Tensor:
    """A transposed convolution's weight `(in_channels, out_channels / groups, ...)` with one filter an entry of the leading
    dimension, `(out_channels, in_channels / groups, ...)`, or back: `(G a, b, ...)` to `(G b, a, ...)` is its own inverse.
    """
    a, b = weight.shape[0] // groups, weight.shape[1]
    grouped = weight.reshape(groups, a, b, *weight.shape[2:]).transpose(1, 2)
    return grouped.reshape(groups * b, a, *weight.shape[2:])
