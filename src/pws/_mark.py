"""The mark on a plain layer that says: its weight is a standardized kernel, which the optimizer keeps so.

`layer.pws = Mark(gain, gamma, relative_gamma)` on a layer of torch.nn (or a subclass) is the one place where this is said. The
model computes with `layer.weight` as ever; an optimizer of `pws.optim` reads the marks and moves the kernel as PWS does. A
mark is a plain attribute: it survives deepcopy, pickle, casts and wrappers, and no state_dict holds it.

Shape letters: O filters (output channels), K entries of a filter (the fan-in n).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeVar

import torch
from torch import Tensor, nn

from pws._autocast import fresh_casts
from pws._errors import PwsError
from pws._gain import resolve_gain
from pws._standardize import check_fan_in, check_gamma, swap_channels, wide_kernel

LAYERS: Final = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
"""What can be marked, subclasses included."""
TRANSPOSED: Final = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

Layer = TypeVar("Layer", bound=nn.Module)


@dataclass(frozen=True)
class Mark:
    """How a layer's weight is standardized: the arguments of `pws.standardize`."""

    gain: float
    gamma: float = 1e-3
    relative_gamma: bool = False


def mark(
    layer: Layer,
    *,
    gain: float | str = "relu",
    gamma: float = 1e-3,
    relative_gamma: bool = False,
    reset_parameters: bool = False,
) -> Layer:
    """Mark a layer of torch.nn, so that an optimizer of `pws.optim` standardizes its weight.

        kernel_o = gain / sqrt(n) * alpha_o * (w_o - m_o) / sqrt(v_o + gamma)

    `layer.weight` is the kernel; `w` and `alpha` live in the optimizer's state, made from whatever the weight is when the
    optimizer is made. So a trained weight keeps its values, but for the mean of each filter.

    Args:
        layer: a convolution, transposed convolution or Linear, or a subclass that computes with its `weight`.
        gain: `c * sqrt(n)`, a number or the name of the activation in front of the layer.
        gamma: added to the variance inside the root, in units of weight squared.
        relative_gamma: add `gamma * 2 / n` instead.
        reset_parameters: draw the weight anew: the kernel of Kaiming-normal filters and alpha 1; and set the bias to 0.

    Returns:
        The layer itself.

    Raises:
        PwsError: the layer is of another kind, its weight is computed (weight norm, pruning), or gamma or gain can't be.
        ShapeError: its filters have one entry each.

    Examples:
        >>> layer = mark(nn.Conv2d(3, 8, 3), gain="linear", reset_parameters=True)
        >>> layer.pws
        Mark(gain=1.0, gamma=0.001, relative_gamma=False)
        >>> type(layer)
        <class 'torch.nn.modules.conv.Conv2d'>
    """
    check_gamma(gamma)
    weight = layer._parameters.get("weight") if isinstance(layer, LAYERS) else None
    if weight is None or hasattr(layer, "alpha"):
        raise PwsError(
            "a mark says that a layer's own weight is standardized: it is for torch.nn's convolutions and Linear; got a "
            f"{type(layer).__name__}{_why_not(layer)}. Mark the plain layers of a model, one by one, or use pws.convert."
        )
    check_fan_in(filters_of(layer, weight))
    found = Mark(resolve_gain(gain), float(gamma), bool(relative_gamma))
    vars(layer)["pws"] = found
    if reset_parameters:
        with torch.no_grad(), fresh_casts():
            filters = filters_of(layer, weight)
            raw = torch.empty_like(filters).normal_(std=(2 / filters[0].numel()) ** 0.5)
            weight.copy_(filters_of(layer, kernel_of(raw, None, found)))
            bias = layer._parameters.get("bias")
            if bias is not None:
                bias.zero_()
    return layer


def _why_not(layer: nn.Module) -> str:
    if isinstance(layer, LAYERS) and hasattr(layer, "alpha"):
        return ", which standardizes its weight itself"
    return ", whose weight is computed from other parameters" if isinstance(layer, LAYERS) else ""


def mark_of(layer: nn.Module) -> Mark | None:
    """The mark of a layer; None if it has none."""
    found = vars(layer).get("pws")
    return found if isinstance(found, Mark) else None


def marked(model: nn.Module) -> dict[str, Mark]:
    """List the marked layers of a model: the name of each, to its mark.

    Examples:
        >>> marked(nn.Sequential(mark(nn.Linear(4, 2), gain=1.0), nn.ReLU()))
        {'0': Mark(gain=1.0, gamma=0.001, relative_gamma=False)}
    """
    return {name: found for name, module in model.named_modules() if (found := mark_of(module)) is not None}


def unmark(model: nn.Module) -> None:
    """Remove all marks of a model: its weights are plain weights again."""
    for module in model.modules():
        vars(module).pop("pws", None)


def filters_of(layer: nn.Module, weight: Tensor) -> Tensor:
    """A tensor of the shape of the layer's weight with one filter an entry of the leading dimension, `(O, ...)`, or back: the
    same, but for a transposed convolution."""
    return swap_channels(weight, int(layer.groups)) if isinstance(layer, TRANSPOSED) else weight


def kernel_of(w: Tensor, alpha: Tensor | None, mark: Mark) -> Tensor:
    """The kernel of filters `(O, ...)`, in float32 at least."""
    return wide_kernel(w, alpha, mark.gain, mark.gamma, mark.relative_gamma)


def adopt(kernel: Tensor, mark: Mark) -> tuple[Tensor, Tensor]:
    """`w` and `alpha` of a weight: the inverse of `pws.standardize`, but for the mean of each filter, which is lost.

        w_o = sqrt(2 / n) (k_o - mean(k_o)) / std(k_o),      alpha_o = std(k_o) sqrt(2 / n + gamma) / (c sqrt(2 / n))

    so that `w` has the size of Kaiming's filters, whatever the size of the kernel: learning rates and the bound on a step are
    made for that. A filter without variance gets alpha 0 and a direction drawn from a fixed seed, along which alpha can grow.

    Args:
        kernel: `(O, ...)`, a filter an entry of the leading dimension.
        mark: how it is standardized.

    Returns:
        `w`, laid out as the kernel, and `alpha` `(O,)`; float32, or float64 for a float64 kernel.
    """
    kernel = kernel.detach().to(torch.promote_types(kernel.dtype, torch.float32))
    dims = tuple(range(1, kernel.dim()))
    n = kernel.shape[1:].numel()
    # In units of the filter's largest entry, a power of two: squares of large filters overflow, those of small ones vanish.
    unit_of = torch.exp2(kernel.abs().amax(dims, keepdim=True).log2().floor())
    unit_of = torch.where((unit_of > 0) & torch.isfinite(unit_of), unit_of, 1.0)
    kernel = kernel / unit_of
    centred = kernel - kernel.mean(dims, keepdim=True)
    std = centred.square().mean(dims, keepdim=True).sqrt()
    # What rounding leaves of a constant filter is no variance.
    flat = std <= 8 * torch.finfo(kernel.dtype).eps * kernel.abs().amax(dims, keepdim=True)
    if flat.any():
        generator = torch.Generator("cpu").manual_seed(0)
        drawn = torch.randn(kernel.shape, generator=generator, device="cpu", dtype=torch.float32).to(kernel)
        drawn = drawn - drawn.mean(dims, keepdim=True)
        drawn = drawn / drawn.square().mean(dims, keepdim=True).sqrt()
        unit = torch.where(flat, drawn, centred / std)
        std = torch.where(flat, 0.0, std)
    else:
        unit = centred / std
    kaiming = (2 / n) ** 0.5
    gamma = mark.gamma * 2 / n if mark.relative_gamma else mark.gamma
    c = mark.gain * n**-0.5
    alpha = (std * unit_of).flatten() * ((kaiming**2 + gamma) ** 0.5 / (c * kaiming))
    return torch.empty_like(kernel).copy_(unit * kaiming), alpha
