"""Which layers only scale what others make: squeeze and excitation, the queries and keys of attention, routers of kernels.

A gate's own variance says nothing about the signal that goes through the network. It is known by how it is used: its output
goes into what follows as a factor of a product, behind a function with bounded values. That is read from autograd's graph.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Final, TypeVar

Key = TypeVar("Key")

# The beginnings of the names of the graph's nodes.
PRODUCTS: Final = ("Mul", "Bmm", "Mm", "Baddbmm", "Addcmul")
BOUNDED: Final = ("Sigmoid", "Hardsigmoid", "Softmax", "SafeSoftmax", "Tanh", "Hardtanh", "Clamp")
SIGNED: Final = ("Tanh", "Hardtanh")
SIGNAL_OF: Final = {"ScaledDotProduct": (2,), "Div": (0,), "Lerp": (0, 1)}
"""Which inputs carry the signal: the values of attention, a numerator, the two ends of a mixture. The others scale it."""
PLAIN, IN_PRODUCT, GATED = range(3)
"""How far a way back has come: no product yet, in a factor of one, behind a bounded function of that factor."""


class Gates:
    """Follows each layer's input back to the layers that it comes from."""

    def __init__(self) -> None:
        self._makers: dict[Any, Any] = {}
        self._uses: dict[Any, dict[Any, bool]] = defaultdict(dict)

    def takes(self, key: Key, node: Any, *, as_kernel: bool = False) -> None:
        """A layer runs, whose input (or computed kernel) the graph's `node` made."""
        met = self._sources(node)
        for source, ways in met.items():
            gated = as_kernel or ways == {GATED}
            self._uses[source][key] = gated and self._uses[source].get(key, True)

    def makes(self, key: Key, node: Any) -> None:
        """The graph's `node` made the layer's output."""
        if node is not None:
            self._makers[node] = key

    def ends(self) -> set[Any]:
        """The layers whose output no other layer takes."""
        return set(self._makers.values()) - set(self._uses)

    def found(self) -> set[Any]:
        """The layers whose every use is as a gate, or by a gate; forgets the graph."""
        self._makers.clear()
        gates: set[Any] = set()
        for source in reversed(list(self._uses)):  # those that follow first
            if all(gated or taker in gates for taker, gated in self._uses[source].items()):
                gates.add(source)
        return gates

    def _sources(self, start: Any) -> dict[Any, set[int]]:
        met: dict[Any, set[int]] = defaultdict(set)
        seen, ahead = set(), [(start, PLAIN)]
        while ahead:
            node, way = ahead.pop()
            if node is None or (node, way) in seen:
                continue
            seen.add((node, way))
            if node in self._makers:
                met[self._makers[node]].add(way)
            else:
                ahead += _back(node, way)
        return met


def _back(node: Any, way: int) -> list[tuple[Any, int]]:
    """The nodes before a node, and how far the way to each has come."""
    name, before = node.name(), [following for following, _ in node.next_functions]
    carrying = next((inputs for start, inputs in SIGNAL_OF.items() if name.startswith(start)), None)
    if carrying is not None:
        return [(following, way if i in carrying else GATED) for i, following in enumerate(before)]
    if way == IN_PRODUCT and name.startswith(BOUNDED):
        way = GATED
    factors = [following for following in before if following is not None and "AccumulateGrad" not in following.name()]
    if way == PLAIN and name.startswith(PRODUCTS) and len(factors) > 1:
        stream = _stream_of(factors)
        return [(following, PLAIN if following in stream else IN_PRODUCT) for following in before]
    return [(following, way) for following in before]


def _stream_of(factors: list[Any]) -> list[Any]:
    """Where all factors are bounded, as in `tanh(f) * sigmoid(g)`, those with a sign carry the signal; all if none has one."""
    if not all(factor.name().startswith(BOUNDED) for factor in factors):
        return []
    return [factor for factor in factors if factor.name().startswith(SIGNED)] or factors
