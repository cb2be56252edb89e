"""The gradients per sample of a layer of PWS, registered in Opacus (`_register`).

Opacus looks a layer up by its exact class. Without this, layers of PWS would be differentiated by functorch, which convolves
each sample on its own. A subclass registers itself: `register_grad_sampler(Mine)(standardized_grad_sample)`.

The average gradient is removed before Opacus clips, so it uses up none of the clip norm.

Shape letters: B samples, O filters, K entries of a filter (the fan-in n).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pws._layers import StandardizedLayer
from pws.private.kernel_gradient import Samples, products, sampler, samples_at_once, weights, wide
from pws.private.standardization import standardization


@sampler
def standardized_grad_sample(layer: StandardizedLayer, activations: Sequence[Tensor], backprops: Tensor) -> Samples:
    """Make the gradient of each sample in weight, alpha and bias, those that are trained.

    Args:
        layer: any layer of PWS; its padding mode, groups, stride and dilation are what they are.
        activations: its input alone, `(B, ...)`.
        backprops: the gradient of its output, `(B, ...)`, of which the result takes its dtype; sums are in float32 at least.

    Returns:
        A parameter to its gradients, `(B, *parameter.shape)`.
    """
    found: Samples = {}
    if layer.weight.requires_grad or layer.alpha.requires_grad:
        found[layer.weight], found[layer.alpha] = _kernel_parameters(layer, activations[0], backprops)
    if layer.bias is not None:
        found[layer.bias] = bias_gradients(layer, backprops)
    return {parameter: gradients for parameter, gradients in found.items() if parameter.requires_grad}


@sampler
def conv_grad_sample(layer: Any, activations: Sequence[Tensor], backprops: Tensor) -> Samples:
    """Make the gradient of each sample in weight and bias of a torch.nn convolution of any padding and memory format.

    Opacus' own takes every padding for zeros, and reads the memory of images in `torch.channels_last` in the wrong order: the
    gradients would be wrong, and so the norms to which they are clipped.
    """
    found: Samples = {}
    if layer.weight.requires_grad:
        each = [G_BOK for _, G_BOK in products(layer, activations[0], backprops)]
        rows_BOK = torch.cat(each) if each else backprops.new_zeros(0, *layer.weight.flatten(1).shape)
        found[layer.weight] = weights(layer, rows_BOK.to(backprops.dtype))
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = bias_gradients(layer, backprops)
    return found


def bias_gradients(layer: nn.Module, dy: Tensor) -> Tensor:
    """The output's gradient summed over the positions, `(B, O)`."""
    return torch.einsum("b...o->bo" if isinstance(layer, nn.Linear) else "bo...->bo", dy)


def _kernel_parameters(layer: StandardizedLayer, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of weight and alpha (see `Standardization`).

    They are those of batch norm over channels that are the filters of each sample, N of them, and positions that are a filter's
    entries: one fused operator.
    """
    known = standardization(layer, wide(dy))
    filters, fan_in = known.w.shape
    most = min(len(dy), samples_at_once(known.w.numel(), dy.device))
    w_NK, factor_N = known.w.repeat(most, 1), known.factor.repeat(most)
    mean_N, rstd_N = known.mean.repeat(most), known.rstd.repeat(most)
    dw_BOK, dalpha_BO = dy.new_empty(len(dy), filters, fan_in), dy.new_empty(len(dy), filters)
    for part, G_BOK in products(layer, x, dy):
        G_1NK = G_BOK.view(1, -1, fan_in)
        count = G_1NK.shape[1]
        dw_1NK, along_N, _ = torch.ops.aten.native_batch_norm_backward(
            *(G_1NK, w_NK[:count].unsqueeze(0), factor_N[:count], None, None, mean_N[:count], rstd_N[:count]),
            *(True, 0.0, [True, True, False]),
        )
        dw_BOK[part] = dw_1NK.view(-1, filters, fan_in)
        dalpha_BO[part] = known.c * along_N.view(-1, filters)
    return weights(layer, dw_BOK), dalpha_BO
