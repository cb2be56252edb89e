"""Parameters sharded by FSDP2 or tensor parallelism: the filters of this process, and sums over those of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from pws._errors import PwsError


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it, unless it is a DTensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def versions(tensor: Tensor) -> tuple[int, int]:
    """These change whenever somebody writes: to a DTensor, or to the part that this process holds."""
    return tensor._version, local(tensor)._version


def complete_gradient(parameter: Any) -> None:
    """Split a gradient as the parameter is: tensor parallelism may leave it as parts that have yet to be summed."""
    if is_sharded(parameter.grad) and parameter.grad.placements != parameter.placements:
        parameter.grad = parameter.grad.redistribute(placements=parameter.placements)


def like(parameter: Any, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """This process's part of a state, as a tensor of the whole `shape` that is split as the parameter is; along the filters
    where they come first in the state alone."""
    if not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import DTensor, Shard

    placements = parameter.placements
    if tensor.shape != local(parameter).shape:
        placements = [Shard(0) if place.is_shard() else place for place in placements]
    alike = tuple(shape) == tuple(parameter.shape)
    stride = parameter.stride() if alike else torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        tensor, parameter.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def check_sharding(parameter: Any, name: str, transposed: int) -> None:
    """Raise `PwsError` unless each process holds whole filters."""
    if not is_sharded(parameter):
        return
    wanted = 1 if transposed else 0
    for place in parameter.placements:
        if place.is_replicate() or (place.is_shard(wanted) and transposed <= 1):
            continue
        remedy = {
            0: "Split it along dimension 0.",
            1: "Split it so: fully_shard(model, shard_placement_fn=lambda p: Shard(1) if p is conv.weight else None).",
        }
        raise PwsError(
            f"the statistics of a filter need all of it on one process; {name!r} is split as {place} and holds its filters "
            f"along dimension {wanted}{', in groups' if transposed > 1 else ''}. "
            + remedy.get(transposed, "Take the mark off this layer, or keep it whole on every process.")
        )


def sum_over_shards(squares: Tensor, parameters: Sequence[Any]) -> Tensor:
    """Each layer's number `(L,)`, added over the processes that hold parts of its parameter: one reduction per mesh."""
    meshes: dict[Any, list[int]] = {}
    for i, parameter in enumerate(parameters):
        if is_sharded(parameter):
            for dim, place in enumerate(parameter.placements):
                if not place.is_replicate():
                    meshes.setdefault(parameter.device_mesh.get_group(dim), []).append(i)
    for group, numbers in meshes.items():
        part = squares[numbers]
        distributed.all_reduce(part, group=group)
        squares = squares.index_copy(0, torch.tensor(numbers, device=squares.device), part)
    return squares


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered if it is a DTensor; every process must ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def replicated(parameter: Any, values: Tensor) -> Tensor:
    """`values`, which every process has, as a DTensor if `parameter` is one, so that they can be computed with together."""
    if not is_sharded(parameter):
        return values
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    return DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)


def reshard(model: nn.Module) -> None:
    """Give back what `fully_shard` gathered for a forward pass: parameters are written where they are sharded."""
    for module in model.modules():
        if callable(release := getattr(module, "reshard", None)):
            release()
