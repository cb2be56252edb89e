"""Residual branches, found by following one run of a model."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from pws._batch import Batch
from pws.surgery.trace import trace
from pws.surgery.value import INPUT, Trace


def branch_ends(model: nn.Module, batch: Batch, layers: Collection[str]) -> dict[str, float]:
    """The share of the variance (1 over the number of additions) of each of these layers that ends a residual branch."""
    run = trace(model, batch, lambda _: False)
    ends = [found for ends in _ends(run) if (found := ends & set(layers))]
    return {name: 1 / len(ends) for found in ends for name in found}


def _ends(run: Trace) -> list[set[str]]:
    """For each addition, the sources of its operand behind the most layers that are not those of another operand too.

    They are at least as large as the sum, alone or joined: a feature pyramid adds a map that was resized to one of its peers,
    which is no residual branch.
    """
    found = []
    for addition in run.sums:
        branch = max(addition.operands, key=lambda value: value.depth)
        others = [value for value in addition.operands if value is not branch]
        ends = set(branch.sources).difference(*(value.sources for value in others)) - {INPUT}
        sizes = [run.sizes.get(name, 0) for name in ends]
        found.append(ends if sum(sizes) >= addition.size else set[str]())
    return found
