"""Residual branches, found by following one run of a model."""

from __future__ import annotations

from torch import nn

from pws._batch import Batch
from pws.surgery.trace import trace
from pws.surgery.value import INPUT, Trace


def branch_ends(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Name of each layer that ends a residual branch, to its share of the variance: 1 over the number of additions."""
    run = trace(model, batch, lambda _: False)
    ends = [found for found in _ends(run) if found]
    return {name: 1 / len(ends) for found in ends for name in found}


def _ends(run: Trace) -> list[set[str]]:
    """For each addition, the sources of its operand behind the most layers that are not those of another operand too.

    They are as large as the sum, alone or joined. A feature pyramid adds a resized map, and a box decoder moves anchors by
    what it computes: neither ends a residual branch.
    """
    found = []
    for addition in run.sums:
        branch = max(addition.operands, key=lambda value: value.depth)
        others = [value for value in addition.operands if value is not branch]
        ends = set(branch.sources).difference(*(value.sources for value in others)) - {INPUT}
        sizes = [run.sizes.get(name, 0) for name in ends]
        fits = set(sizes) == {addition.size} or sum(sizes) == addition.size
        found.append(ends if fits else set[str]())
    return found
