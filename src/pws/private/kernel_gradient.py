"""The gradient of a layer's kernel for each sample, as a product of two matrices per sample and group.

    G = L R^T        L (B, groups, M, P), R (B, groups, N, P)

For a convolution and for Linear, L is the gradient of the output and R the patches of the input; the patches are what each
output position sees. A transposed convolution is a convolution the other way round: L are the patches of the output's
gradient and R is the input.

Opacus' own product for convolutions is of no use here: it knows exact classes alone, takes every padding for zeros, and
multiplies each group with all others.

Shape letters: B samples, O filters, K entries of a filter (the fan-in n), P positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

AT_ONCE: Final = {"cpu": 2**20}
"""Numbers of a matrix that are worked on together: on a CPU they stay in the cache."""
AT_ONCE_ELSEWHERE: Final = 2**26
TRANSPOSED: Final = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
Matrices = tuple[Tensor, Tensor]
Samples = dict[Tensor, Tensor]
"""A parameter to something of it for each sample."""


def sampler(sample: Callable[[Any, Sequence[Tensor], Tensor], Samples]) -> Callable[..., Samples]:
    """A sampler whose products autocast leaves in float32, where the backward pass runs inside it."""

    @wraps(sample)
    def wrapped(layer: nn.Module, activations: Sequence[Tensor], backprops: Tensor) -> Samples:
        with torch.autocast(backprops.device.type, enabled=False):
            return sample(layer, activations, backprops)

    return wrapped


def wide(dy: Tensor) -> torch.dtype:
    """The dtype of sums over samples of `dy`: float32 at least."""
    return torch.promote_types(dy.dtype, torch.float32)


def parts(layer: Any, x: Tensor, dy: Tensor) -> Iterator[tuple[slice, Matrices]]:
    """Some samples at a time, their L and R in float32 at least: no memory is needed for those of all samples."""
    channel = -1 if isinstance(layer, nn.Linear) else 1
    seen, other = (dy, x) if isinstance(layer, TRANSPOSED) else (x, dy)
    patch = seen.shape[channel] * layer.weight.shape[2:].numel()
    dtype = wide(dy)
    for part in slices(len(dy), max(patch, other.shape[channel]) * positions_of(layer, x, dy), dy.device):
        yield part, matrices(layer, x[part].to(dtype), dy[part].to(dtype))


def products(layer: Any, x: Tensor, dy: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some samples at a time, their `G`, `(B, O, K)`."""
    filters = filters_of(layer)
    for part, (left, right) in parts(layer, x, dy):
        for inner in slices(len(left), layer.weight.numel(), dy.device):
            G_BOK = torch.matmul(left[inner], right[inner].mT).view(-1, filters, layer.weight.numel() // filters)
            start = part.start + inner.start
            yield slice(start, start + len(G_BOK)), G_BOK


def slices(samples: int, numbers: int, device: torch.device) -> Iterator[slice]:
    """As many samples at a time as `samples_at_once` says."""
    step = samples_at_once(numbers, device)
    for start in range(0, samples, step):
        yield slice(start, start + step)


def samples_at_once(numbers: int, device: torch.device) -> int:
    """How many samples are worked on together, of so many numbers each."""
    return max(1, AT_ONCE.get(device.type, AT_ONCE_ELSEWHERE) // max(1, numbers))


def matrices(layer: Any, x: Tensor, dy: Tensor) -> Matrices:
    """L and R of all samples given."""
    if isinstance(layer, nn.Linear):
        return _columns(dy), _columns(x)
    ndim = len(layer.kernel_size)
    if isinstance(layer, TRANSPOSED):
        padding: Any = layer.padding
        padded = F.pad(dy, [size for size in reversed(padding) for _ in range(2)])
        return _patches(padded, layer, x.shape[2:]), _grouped(x, layer.groups, ndim)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    return _grouped(dy, layer.groups, ndim), _patches(padded, layer, dy.shape[2:])


def rows(layer: Any, weight: Tensor) -> Tensor:
    """The weight as `(O, K)`, the entries of a filter in the order in which `G` has them."""
    if not isinstance(layer, TRANSPOSED):
        return weight.flatten(1)
    _, out, *size = weight.shape
    return weight.reshape(layer.groups, -1, out, *size).flatten(3).permute(0, 2, 3, 1).flatten(2).flatten(0, 1)


def weights(layer: Any, rows_BOK: Tensor) -> Tensor:
    """The inverse of `rows` for each sample: `(B, *weight.shape)`."""
    shape = layer.weight.shape
    if isinstance(layer, TRANSPOSED):
        grouped = (layer.groups, shape[1], shape[2:].numel(), shape[0] // layer.groups)
        rows_BOK = rows_BOK.view(len(rows_BOK), *grouped).permute(0, 1, 4, 2, 3)
    return rows_BOK.reshape(len(rows_BOK), *shape)


def filters_of(layer: Any) -> int:
    """The number of filters."""
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def positions_of(layer: nn.Module, x: Tensor, dy: Tensor) -> int:
    """P: of the output, and of the input for a transposed convolution."""
    if isinstance(layer, nn.Linear):
        return dy.shape[1:-1].numel()
    return (x if isinstance(layer, TRANSPOSED) else dy).shape[2:].numel()


def _columns(features: Tensor) -> Tensor:
    """`(B, ..., N)` to `(B, 1, N, P)`."""
    lines_BPN = features.flatten(1, -2) if features.dim() > 2 else features.unsqueeze(1)
    return lines_BPN.transpose(1, 2).unsqueeze(1)


def _grouped(images: Tensor, groups: int, ndim: int) -> Tensor:
    """`(B, C, ...)` to `(B, groups, C / groups, P)`."""
    grouped: Tensor = images.flatten(-ndim).unflatten(1, (groups, -1))
    return grouped


def _patches(images: Tensor, layer: Any, positions: torch.Size) -> Tensor:
    """What the kernel sees at each position: `(B, groups, C / groups * kernel's size, P)`."""
    ndim = len(positions)
    for i, count in enumerate(positions):
        size, stride, dilation = layer.kernel_size[i], layer.stride[i], layer.dilation[i]
        images = images.unfold(2 + i, (size - 1) * dilation + 1, stride)[..., ::dilation].narrow(2 + i, 0, count)
    order = [0, 1, *range(2 + ndim, 2 + 2 * ndim), *range(2, 2 + ndim)]
    patches: Tensor = images.permute(order).flatten(-ndim).flatten(1, -2)
    return _grouped(patches, layer.groups, 1)
