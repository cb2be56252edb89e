"""Gradients per sample of the scale and shift that stay where a norm was."""

from __future__ import annotations

import torch
from opacus.grad_sample import register_grad_sampler
from torch import Tensor

from pws.surgery.stand_ins import Affine


def affine_grad_sample(layer: Affine, activations: list[Tensor], backprops: Tensor) -> dict[Tensor, Tensor]:
    """Those of `weight_c * x + bias_c`, for the input and the output's gradient of shape `(N, C, ...)`."""
    return {
        layer.weight: torch.einsum("nc...,nc...->nc", backprops, activations[0]),
        layer.bias: torch.einsum("nc...->nc", backprops),
    }


register_grad_sampler(Affine)(affine_grad_sample)
