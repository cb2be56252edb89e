"""Shard a network (FSDP2): each process holds some of the filters of every layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from pws.optim.sharding import is_sharded

PARTS: Final = 8
"""A unit, which is gathered at once, holds at most this part of the parameters, unless a layer is larger."""
TRANSPOSED: Final = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def shard(model: nn.Module, mesh: Any) -> None:
    """Split the parameters over the processes of `mesh`, along the filters of each; once."""
    if any(map(is_sharded, model.parameters())):
        return

    def place(parameter: nn.Parameter) -> Shard | None:
        return Shard(1) if id(parameter) in transposed else None

    model.to(memory_format=torch.contiguous_format)  # what fully_shard takes
    transposed = {id(m.weight) for m in model.modules() if isinstance(m, TRANSPOSED) and m.groups == 1}
    for unit in list(_units(model, sum(p.numel() for p in model.parameters()) // PARTS)):
        fully_shard(unit, mesh=mesh, shard_placement_fn=place)
    fully_shard(model, mesh=mesh, shard_placement_fn=place)


def _units(model: nn.Module, limit: int) -> Iterator[nn.Module]:
    """The largest modules below `model` that hold at most `limit` parameters, and single layers that hold more."""
    for module in model.children():
        size = sum(p.numel() for p in module.parameters())
        called = not isinstance(module, nn.ModuleList | nn.ModuleDict)
        # Attention reads the weights of the layer within it, and calls none.
        whole = size <= limit or isinstance(module, nn.MultiheadAttention) or not any(True for _ in module.children())
        if size and called and whole:
            yield module
        elif size:
            yield from _units(module, limit)
