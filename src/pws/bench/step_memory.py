"""What a step needs of memory beside what is there before it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile

MEMORY: Final = "[memory]"
"""The name of the profiler's events of the allocator."""


def kept_by(run: Callable[[], object], model: nn.Module) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass, without the parameters."""
    with _kept(model) as kept:
        run()
    return sum(kept.values())


def peak_of(run: Callable[[], None]) -> int:
    """Bytes of the tensors that are alive at once, at most, beyond those alive before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes to stderr, where the live table is
    with profile(profile_memory=True) as profiled:
        run()
    results = profiled.kineto_results
    assert results is not None
    events = sorted((e for e in results.events() if e.name() == MEMORY), key=lambda e: int(e.start_ns()))
    now = most = 0
    for event in events:
        now += event.nbytes()
        most = max(most, now)
    return most


@contextmanager
def _kept(model: nn.Module) -> Iterator[dict[int, int]]:
    """Address to bytes."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
