"""The filters of mean zero that come nearest to what a trained layer gave, measured on its own inputs.

A channel gives `v . p + b` for each patch `p` of its input. Given the targets `t` on an example, find

    min over v, b of  E[(v . p + b - t)^2] + ridge |v - w|^2,      sum(v) = 0

where `w` is the trained filter. With `S = Cov(p, p) + ridge I`, `r = Cov(p, t) + ridge w` and `u = S^-1 1`:

    v = S^-1 r - u (sum(S^-1 r) / sum(u)),      b = E[t] - v . E[p]

So the mean is taken out along `u`, the direction in which the inputs vary least: taken out of all entries alike, it costs as
much as it can, because behind an activation patches vary most in their sum. Where the inputs are the trained network's own
and `w` has mean zero, `v = w`.

Shape letters: G groups, O filters, K entries of a filter (the fan-in), N patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from typing import Final

import torch
from torch import Tensor, nn

from pws._mark import filters_of
from pws.surgery.standardized import own_filters, set_filters

RIDGE: Final = 0.01
"""In units of the inputs' mean variance: directions in which they vary less than this keep the trained filter's entries."""
_ENTRIES: Final = 2**25
"""Entries of patches that are in memory at once."""


Call = Callable[[nn.Module, Tensor], Tensor]


def forward(layer: nn.Module, inputs: Tensor) -> Tensor:
    """The layer's outputs, without its hooks."""
    outputs: Tensor = layer.forward(inputs)
    return outputs


@torch.no_grad()
def nearest_filters(
    layer: nn.Module, inputs: Tensor, targets: Tensor, trained_OK: Tensor, call: Call = forward
) -> None:
    """Set weight and bias so that the layer's outputs come nearest to `targets`.

    Args:
        layer: a plain one with a bias.
        inputs: what it is called with, the batch first.
        targets: the outputs wanted, with the channels last.
        trained_OK: the filters that gave them from the trained network's inputs.
        call: how the layer is called.
    """
    groups = int(getattr(layer, "groups", 1))
    filters, entries = trained_OK.shape
    # Entry K of a patch is 1, so that one product holds the sums too.
    products_GKK = torch.zeros(groups, entries + 1, entries + 1, dtype=torch.float64, device=inputs.device)
    products_GKO = torch.zeros(groups, entries + 1, filters // groups, dtype=torch.float64, device=inputs.device)
    sums_GO, count = torch.zeros_like(products_GKO[:, 0]), 0
    for patches_GNK, targets_GNO in _parts(layer, inputs, targets, groups, entries, call):
        products_GKK += patches_GNK.mT @ patches_GNK
        products_GKO += patches_GNK.mT @ targets_GNO
        sums_GO += targets_GNO.sum(1)
        count += patches_GNK.shape[1]
    mean_GK, mean_GO = products_GKK[:, -1, :-1] / count, sums_GO / count
    inner_GKK = products_GKK[:, :-1, :-1] / count - mean_GK[:, :, None] * mean_GK[:, None]
    cross_GKO = products_GKO[:, :-1] / count - mean_GK[:, :, None] * mean_GO[:, None]
    found_GKO = _solve(inner_GKK, cross_GKO, trained_OK.double().view(groups, -1, entries).mT)
    bias_GO = mean_GO - (found_GKO * mean_GK[:, :, None]).sum(1)
    set_filters(layer, found_GKO.mT.reshape(own_filters(layer).shape))
    bias = layer._parameters["bias"]
    assert bias is not None
    bias.copy_(bias_GO.flatten())
    # A forward that is decorated with autocast has its cache on, and would go on with the copy of the weight before.
    torch.clear_autocast_cache()


def _solve(inner_GKK: Tensor, cross_GKO: Tensor, trained_GKO: Tensor) -> Tensor:
    spread_G = inner_GKK.diagonal(dim1=1, dim2=2).mean(1)
    # Inputs that never vary say nothing about the filters: the trained ones, centred.
    ridge_G = torch.where(spread_G > 0, RIDGE * spread_G, 1.0)[:, None, None]
    eye_KK = torch.eye(inner_GKK.shape[1], dtype=torch.float64, device=inner_GKK.device)
    ones_GK1 = torch.ones_like(trained_GKO[:, :, :1])
    right_GKX = torch.cat([cross_GKO + ridge_G * trained_GKO, ones_GK1], 2)
    solved_GKX = torch.cholesky_solve(right_GKX, torch.linalg.cholesky(inner_GKK + ridge_G * eye_KK))
    free_GKO, least_GK1 = solved_GKX[:, :, :-1], solved_GKX[:, :, -1:]
    nearest_GKO: Tensor = free_GKO - least_GK1 * (free_GKO.sum(1, keepdim=True) / least_GK1.sum(1, keepdim=True))
    return nearest_GKO


def _parts(
    layer: nn.Module, inputs: Tensor, targets: Tensor, groups: int, entries: int, call: Call
) -> Iterator[tuple[Tensor, Tensor]]:
    """Some samples' patches, with a 1 behind each, and their targets: `(G, N, K + 1)` and `(G, N, O / G)`."""
    reader = _reader(layer, groups, entries)
    positions = targets[:1].numel() // targets.shape[-1]
    samples = max(1, _ENTRIES // (positions * groups * entries))
    channel = 1 - own_filters(layer).dim()
    for some, wanted in zip(torch.split(inputs, samples), torch.split(targets, samples), strict=True):
        patches = call(reader, some).movedim(channel, -1).double()
        patches_GNK = patches.reshape(-1, groups, entries).transpose(0, 1)
        targets_GNO = wanted.double().reshape(patches_GNK.shape[1], groups, -1).transpose(0, 1)
        yield torch.cat([patches_GNK, torch.ones_like(patches_GNK[:, :, :1])], 2), targets_GNO


def _reader(layer: nn.Module, groups: int, entries: int) -> nn.Module:
    """The layer without its filters: its outputs are the patches, of one group behind the other. Whatever it does about
    padding, strides and dilation, it does here."""
    filters = own_filters(layer)
    eye_KK = torch.eye(entries, dtype=filters.dtype, device=filters.device)
    rows = eye_KK.repeat(groups, 1).view(-1, *filters.shape[1:])
    reader = copy(layer)
    reader._parameters = layer._parameters | {"weight": nn.Parameter(filters_of(layer, rows)), "bias": None}
    return reader
