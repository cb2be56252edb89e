"""Means, variances and covariances over positions, pooled over calls without losing digits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """The moments of a signal with C channels over `count` positions; float64 tensors `(C,)`.

    The variance is biased: `E[(a - E[a])^2]`.
    """

    count: int
    mean: Tensor
    variance: Tensor

    @property
    def second_moment(self) -> Tensor:
        """`E[a^2]`."""
        return self.variance + self.mean.square()

    def total_variance(self) -> Tensor:
        """The variance over positions and channels together."""
        return self.variance.mean() + self.mean.var(correction=0)


def pool(parts: list[Moments]) -> Moments:
    """The moments over the positions of all parts (Chan, Golub, LeVeque 1983)."""
    counts = _counts(parts)
    means = torch.stack([part.mean for part in parts])
    mean = (counts * means).sum(0) / counts.sum()
    variances = torch.stack([part.variance for part in parts])
    variance = (counts * (variances + (means - mean).square())).sum(0) / counts.sum()
    return Moments(sum(part.count for part in parts), mean, variance)


def pool_covariance(first: list[Moments], second: list[Moments], covariances: list[Tensor]) -> Tensor:
    """The covariance of two signals over the positions of all parts."""
    counts, a, b = _counts(first), pool(first).mean, pool(second).mean
    between = [(p.mean - a) * (q.mean - b) for p, q in zip(first, second, strict=True)]
    return (counts * (torch.stack(covariances) + torch.stack(between))).sum(0) / counts.sum()


def _counts(parts: list[Moments]) -> Tensor:
    return torch.tensor([[part.count] for part in parts], dtype=torch.float64, device=parts[0].mean.device)


def positions(signal: Tensor, channel_dim: int) -> list[int]:
    """The dimensions that are not the channels; a signal has one at least (see `batched`)."""
    return [dim for dim in range(signal.dim()) if dim != channel_dim % signal.dim()]


def batched(signal: Tensor) -> Tensor:
    """Return the signal with a dimension of positions: a linear layer's single sample comes without any."""
    return signal if signal.dim() > 1 else signal[None]


def channel_sums(signal: Tensor, channel_dim: int) -> Tensor:
    """The sum over positions, dimensions kept, in float64.

    Over space in the signal's own precision, in torch's cascades, then over the batch in float64: float64 throughout would
    take 40 times as long, and buys no digit that matters.
    """
    dims = positions(signal, channel_dim)
    inner = signal.sum(dims[1:], keepdim=True) if len(dims) > 1 else signal
    return inner.double().sum(dims, keepdim=True)


def centre(signal: Tensor, channel_dim: int) -> tuple[Moments, Tensor]:
    """The moments of each channel, and the signal less its channels' means: a large mean costs no digits."""
    sums = channel_sums(signal, channel_dim)
    count = signal.numel() // sums.numel()
    mean = sums / count
    centred = signal - mean.to(signal.dtype)
    variance = channel_sums(centred.square(), channel_dim).flatten() / count
    if signal.dtype != torch.float64 and not ((variance > 0) & torch.isfinite(variance)).all():
        squares = centred.double().square()  # those that left the range of float32
        variance = channel_sums(squares, channel_dim).flatten() / count
    return Moments(count, mean.flatten(), variance), centred


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 at least, without its graph."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def is_finite(signal: Tensor) -> bool:
    """Whether every entry is; looked at one by one only where their sum is not."""
    return bool(torch.isfinite(signal.sum())) or bool(torch.isfinite(signal).all())


def sum_of_squares(tensors: Iterable[Tensor]) -> float:
    """The sum over all entries of all tensors."""
    return float(sum(torch.linalg.vector_norm(wide(t), dtype=torch.float64).square() for t in tensors))
