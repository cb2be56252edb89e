"""Weights as filters in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from pws._param_groups import Member
from pws._standardize import swap_channels
from pws.optim.sharding import local


def filters(tensor: Tensor | None, member: Member) -> Tensor:
    """What this process holds of a weight or its gradient: a filter an entry of the leading dimension, dense in memory."""
    assert tensor is not None
    held = local(tensor).detach()
    held = swap_channels(held, member.transposed) if member.transposed else held
    return held if is_dense(held) else held.resolve_neg().contiguous()


def filters_shape(weight: Tensor, member: Member) -> torch.Size:
    """Return the shape of the whole weight, filters first."""
    if not member.transposed:
        return weight.shape
    a, b, *size = weight.shape
    return torch.Size([b * member.transposed, a // member.transposed, *size])


def is_dense(tensor: Tensor) -> bool:
    """Whether memory holds the entries of each filter next to each other, one filter behind the other, in whatever order."""
    if tensor.is_neg():  # a view whose memory holds the opposite
        return False
    if tensor.is_contiguous():
        return True
    expected = 1
    for dim in sorted(range(1, tensor.dim()), key=tensor.stride):
        if tensor.shape[dim] > 1:
            if tensor.stride(dim) != expected:
                return False
            expected *= tensor.shape[dim]
    return tensor.shape[0] <= 1 or tensor.stride(0) == expected


def same_layout(one: Tensor, other: Tensor) -> bool:
    """Whether the entries of two tensors of one shape come in the same order; strides of single entries mean nothing."""
    if one.is_neg() != other.is_neg():
        return False
    strides, wanted = one.stride(), other.stride()
    if strides == wanted:
        return True
    return all(size == 1 or mine == its for size, mine, its in zip(one.shape, strides, wanted, strict=True))


@torch.no_grad()
def centre(weight: Tensor, transposed: int) -> None:
    """Take the mean of each filter out of a weight, where it is more than rounding."""
    held = local(weight)
    rows = swap_channels(held, transposed) if transposed else held
    dims = tuple(range(1, rows.dim()))
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    mean = wide.mean(dims, keepdim=True)
    epsilon = 16 * torch.finfo(wide.dtype).eps + torch.finfo(rows.dtype).eps  # of the mean here, of what is stored
    rounding = epsilon * wide.square().mean(dims, keepdim=True).sqrt()
    if bool((mean.abs() > rounding).any()):
        centred = (wide - torch.where(mean.abs() > rounding, mean, 0.0)).to(rows.dtype)
        held.copy_(swap_channels(centred, transposed) if transposed else centred)
