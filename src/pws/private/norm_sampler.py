"""The norm of each sample's gradient for ghost clipping, without the gradients of all samples, registered in Opacus.

Opacus has one for Linear, none for convolutions. (A layer that has one may run once per forward pass; Opacus says so.) The
square of a sample's gradient `G = L R^T` (see `kernel_gradient`) is had in two ways, and each layer takes the cheaper one:

    Gram matrices    |G|^2 = sum((L^T L) * (R^T R)),     two matrices (P, P)
    the gradient     |G|^2 = sum(G^2),                   one matrix (O, K), made for a few samples at a time

A standardized kernel's weight has the gradient `c alpha r (G - mean(G) - h mean(G h))` (see `Standardization`). With the
patches R centred over a filter's entries, L R^T is `G - mean(G)`, and with each filter's L scaled by `s = c alpha r`

    |d w|^2 = |s L R^T|^2 - sum_o s_o^2 a_o^2 (2 / n - sum(h_o^2) / n^2),     a_o = sum(G_o h_o) = sum_p dy_po (x conv h_o)_p

so Gram matrices serve it too, and `a`, which is alpha's gradient over c, takes one more forward pass.

Shape letters: B samples, O filters, K entries of a filter (the fan-in n), P positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pws._layers import StandardizedLayer
from pws.private.grad_sampler import bias_gradients
from pws.private.kernel_gradient import Samples, parts, positions_of, products, sampler, wide
from pws.private.standardization import Standardization, standardization

TOUCH: Final = 16
"""The multiply-adds that writing a number and reading it again take as long as."""


@sampler
def conv_norm_sample(layer: Any, activations: Sequence[Tensor], backprops: Tensor) -> Samples:
    """Take the norm of each sample's gradient in the weight and the bias of a plain convolution, those that are trained.

    Returns:
        A parameter to its norms `(B,)`, in float32 at least.
    """
    found = _bias_norms(layer, backprops)
    if layer.weight.requires_grad:
        found[layer.weight] = _plain_squares(layer, activations[0], backprops).sqrt()
    return found


@sampler
def standardized_norm_sample(layer: StandardizedLayer, activations: Sequence[Tensor], backprops: Tensor) -> Samples:
    """Take the norm of each sample's gradient in weight, alpha and bias of a layer of PWS, those that are trained.

    Returns:
        A parameter to its norms `(B,)`, in float32 at least.
    """
    found = _bias_norms(layer, backprops)
    if layer.weight.requires_grad or layer.alpha.requires_grad:
        known = standardization(layer, wide(backprops))
        squares_B, along_BO = _standardized_squares(layer, activations[0], backprops, known)
        found[layer.weight] = squares_B.clamp(min=0).sqrt()
        found[layer.alpha] = known.c * along_BO.norm(dim=1)
    return {parameter: norms for parameter, norms in found.items() if parameter.requires_grad}


def takes_gram(layer: Any, positions: int) -> bool:
    """Whether Gram matrices are cheaper than the gradient, by the multiply-adds of a sample and group.

        Gram matrices   P^2 (K + O) + TOUCH 2 P^2,   and P K O for the forward pass of a standardized kernel
        the gradient    P K O       + TOUCH K O

    They are with few positions and large kernels. The two matrices then hold less than twice the numbers of the gradient.
    """
    filters, fan_in = len(layer.weight) // getattr(layer, "groups", 1), layer.weight[0].numel()
    forward = positions * fan_in * filters if isinstance(layer, StandardizedLayer) else 0
    gram = positions**2 * (fan_in + filters + 2 * TOUCH) + forward
    return bool(gram < (positions + TOUCH) * fan_in * filters)


def _bias_norms(layer: Any, dy: Tensor) -> Samples:
    if layer.bias is None or not layer.bias.requires_grad:
        return {}
    return {layer.bias: bias_gradients(layer, dy.to(wide(dy))).norm(dim=1)}


def _plain_squares(layer: nn.Module, x: Tensor, dy: Tensor) -> Tensor:
    """`|G|^2` of each sample, `(B,)`."""
    squares_B = dy.new_empty(len(dy), dtype=wide(dy))
    if takes_gram(layer, positions_of(layer, x, dy)):
        for part, (left, right) in parts(layer, x, dy):
            squares_B[part] = _gram(left, right)
    else:
        for part, G_BOK in products(layer, x, dy):
            squares_B[part] = _square(G_BOK).sum(1)
    return squares_B


def _standardized_squares(
    layer: StandardizedLayer, x: Tensor, dy: Tensor, known: Standardization
) -> tuple[Tensor, Tensor]:
    """`|d w|^2` of each sample `(B,)`, and `a` `(B, O)`."""
    h_OK, scale_O = known.h, known.scale
    fan_in, squares_B = h_OK.shape[1], h_OK.new_empty(len(dy))
    if takes_gram(layer, positions_of(layer, x, dy)):
        for part, (left, right) in parts(layer, x, dy):
            scale_GM1 = scale_O.view(left.shape[1], -1, 1)
            squares_B[part] = _gram(left * scale_GM1, right - right.mean(2, keepdim=True))
        along_BO = bias_gradients(layer, _forward(layer, x.to(h_OK.dtype), h_OK) * dy)
    else:
        along_BO = h_OK.new_empty(len(dy), len(h_OK))
        for part, G_BOK in products(layer, x, dy):
            along_BO[part] = torch.linalg.vecdot(G_BOK, h_OK)
            G_BOK -= G_BOK.mean(2, keepdim=True)
            squares_B[part] = _square(G_BOK) @ scale_O.square()
    twice_O = 2 / fan_in - h_OK.square().sum(1) / fan_in**2
    return squares_B - along_BO.square() @ (scale_O.square() * twice_O), along_BO


def _gram(left: Tensor, right: Tensor) -> Tensor:
    """`|L R^T|^2` of each sample, over all groups."""
    return ((left.mT @ left) * (right.mT @ right)).sum((1, 2, 3))


def _square(G_BOK: Tensor) -> Tensor:
    norm_BO: Tensor = torch.linalg.vector_norm(G_BOK, dim=2)
    return norm_BO.square()


def _forward(layer: Any, x: Tensor, h_OK: Tensor) -> Tensor:
    """The layer's output with the kernel h, without the bias."""
    h = h_OK.view(layer.weight.shape)
    output: Tensor = F.linear(x, h) if isinstance(layer, nn.Linear) else layer._conv_forward(x, h, None)
    return output
