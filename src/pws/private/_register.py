"""The samplers, made known to Opacus as its own are; and the check that Opacus is there, before this room needs it."""

from typing import Any

import torch
from torch import Tensor, nn

from pws._errors import PwsError
from pws._layers import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d, Linear
from pws.private.grad_sampler import conv_grad_sample, standardized_grad_sample
from pws.private.norm_sampler import conv_norm_sample, standardized_norm_sample

try:
    from opacus.grad_sample import register_grad_sampler, register_norm_sampler
    from opacus.grad_sample.conv import compute_conv_grad_sample
except ImportError as error:
    raise PwsError("pws.private needs opacus: pip install 'pws-torch[private]'.") from error

register_grad_sampler((Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d, Linear))(
    standardized_grad_sample
)
register_norm_sampler((Conv1d, Conv2d, Conv3d, Linear))(standardized_norm_sample)
register_norm_sampler((nn.Conv1d, nn.Conv2d, nn.Conv3d))(conv_norm_sample)


def _conv_grad_sample(layer: Any, activations: list[Tensor], backprops: Tensor) -> dict[Tensor, Tensor]:
    """Opacus' own where it is right: it takes every padding for zeros, and images to lie in memory channel by channel."""
    x = activations[0]
    right = layer.padding_mode == "zeros" and x.stride() == torch.empty(x.shape, device="meta").stride()
    sample = compute_conv_grad_sample if right else conv_grad_sample
    found: dict[Tensor, Tensor] = sample(layer, activations, backprops)
    return found


register_grad_sampler((nn.Conv1d, nn.Conv2d, nn.Conv3d))(_conv_grad_sample)
