"""What is known of a running model: where its tensors come from, and what a function of torch makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from torch import Tensor, nn

from pws._gain import ACTIVATIONS

INPUT: Final = "<input>"
"""The source of the model's input; layers and norms are sources by their names (that of the model itself is empty)."""
OUTPUT: Final = "output"
"""What takes the model's output."""
COMPUTED: Final = "<computed>"
"""The source of what a convolution or product with a computed kernel gives."""
_LAYERS: Final = ("conv", "linear", "deform_conv", "bilinear")
_SUMS: Final = ("add", "sub", "rsub")
_JOINS: Final = ("cat", "concat", "concatenate", "stack", "hstack")
_PRODUCTS: Final = ("mul", "multiply", "matmul", "bmm", "einsum", "baddbmm")
_SCALES: Final = ("mul", "multiply", "div", "true_divide", "divide", "truediv")
_SELECTIONS: Final = ("topk", "nonzero", "masked_select", "nms", "roi_align", "roi_pool", "ps_roi_align", "multinomial")
_NOTHING: Final = ("clone", "contiguous", "detach", "dropout", "to", "float", "type")


@dataclass(frozen=True)
class Value:
    """Where a tensor comes from."""

    sources: frozenset[str] = frozenset()
    """What it was made of without another of these between: layers, norms, the input, and parameters that did a layer's work
    outside of one, each by its name."""
    steps: frozenset[str] = frozenset()
    """What was done since: "activation", "sum", "join", "product", "other"."""
    activation: str | None = None
    """The last activation since, by its name in torch.nn.functional."""
    depth: int = 0
    """Weight layers on the longest way to it."""
    parameters: frozenset[str] = frozenset()
    """It is made of these alone, or was scaled by them."""
    selected: bool = False
    """Which entries it has depends on the numbers that the model computes: a detector's regions."""

    @property
    def is_known(self) -> bool:
        """Whether it was followed at all."""
        return bool(self.sources or self.parameters)


@dataclass(frozen=True)
class Use:
    """One call of a layer or norm."""

    name: str
    is_norm: bool
    input: Value


@dataclass(frozen=True)
class Sum:
    """An addition of tensors that come from different sources."""

    operands: tuple[Value, ...]
    size: int
    """Entries of the result."""


@dataclass
class Trace:
    """One run of a model."""

    model: nn.Module
    """The copy that ran: its lazy layers have their shapes."""
    uses: list[Use] = field(default_factory=list)
    """In the order of execution."""
    sums: list[Sum] = field(default_factory=list)
    gates: set[str] = field(default_factory=set)
    """Sources that only scale another tensor."""
    takers: dict[str, set[str]] = field(default_factory=dict)
    """Source to what took it: names of layers and norms, `OUTPUT`."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Entries of the output of each layer, in its last call."""
    dims: dict[str, int] = field(default_factory=dict)
    """The number of dimensions of the inputs of layers and norms."""
    foreign: set[str] = field(default_factory=set)
    """Layers that gave something else than what they make with their own weight."""
    in_place: dict[str, set[str]] = field(default_factory=dict)
    """Modules, such as ReLU(inplace=True), to the norms whose input or output they wrote over."""
    aliased: set[str] = field(default_factory=set)
    """Norms without which another tensor would be changed: a function wrote over the norm's input or output, or made a view
    of the output, or put a hook on it."""
    returned: set[str] = field(default_factory=set)
    """Norms whose output the model returned."""


UNKNOWN: Final = Value()
Known = list[tuple[Tensor, Value]]


def merged(name: str, known: Known, on_sum: Callable[[Sum], None], gates: set[str]) -> Value:
    """What the function `name` of torch makes of tensors, some of which may be parameters.

    Args:
        name: as torch names it, without underscores around it.
        known: the tensors with their values.
        on_sum: told of each addition of tensors from different sources.
        gates: gets the sources that only scale another tensor.
    """
    weights = frozenset[str]().union(*(value.parameters for _, value in known if not value.sources))
    signals = [(tensor, value) for tensor, value in known if value.sources]
    if not signals:
        return Value(parameters=weights)
    if len(signals) > 1 and _operation(name).startswith(_LAYERS):
        return replace(_of_signals(name, signals, on_sum, gates), sources=frozenset({COMPUTED}))
    if weights and not _passes(name, signals):
        # As behind a layer: a convolution with a parameter, a recurrent layer, attention.
        if name not in _SCALES:
            depth, selected = max(v.depth for _, v in signals) + 1, any(v.selected for _, v in signals)
            return Value(weights, depth=depth, selected=selected)
        value = _of_signals(name, signals, on_sum, gates)
        return replace(value, parameters=value.parameters | weights)
    return _of_signals(name, signals, on_sum, gates)


def _passes(name: str, signals: Known) -> bool:
    """Whether a function with a parameter leaves a tensor what it was: behind a layer, not behind the input."""
    behind_layer = any(value.sources != {INPUT} for _, value in signals)
    return behind_layer and (_operation(name) in _SUMS or name == "prelu" or "norm" in name)


def _operation(name: str) -> str:
    return name.removeprefix("r").removeprefix("i") if name not in ACTIVATIONS else name


def _of_signals(name: str, known: Known, on_sum: Callable[[Sum], None], gates: set[str]) -> Value:
    values = list(dict.fromkeys(value for _, value in known))
    steps = _union(value.steps for value in values)
    base = Value(
        _union(value.sources for value in values),
        steps | {"other"},
        next((value.activation for value in values if value.activation), None),
        max(value.depth for value in values),
        _union(value.parameters for value in values),
        name in _SELECTIONS or any(value.selected for value in values),
    )
    operation = _operation(name)
    if operation in _SUMS and len(values) > 1:
        on_sum(Sum(tuple(values), max(tensor.numel() for tensor, _ in known)))
        # Where one operand was not scaled by a parameter, the sum is as large as that one.
        scales = values[0].parameters.intersection(*(value.parameters for value in values))
        return replace(base, steps=steps | {"sum"}, activation=None, parameters=scales)
    if operation in _JOINS:
        return replace(base, steps=steps | {"join"}, activation=None)
    if operation in _PRODUCTS and len(values) > 1:
        tensor, large = max(known, key=lambda pair: pair[0].numel())
        # Smaller ones scale it.
        small = _union(value.sources for other, value in known if other.numel() < tensor.numel()) - large.sources
        gates |= small
        return replace(base, sources=base.sources - small, steps=steps | {"product"}, activation=large.activation)
    if name in ACTIVATIONS:
        return replace(base, steps=steps | {"activation"}, activation=name)
    return replace(base, steps=steps) if name in _NOTHING else base


def _union(sets: Iterable[frozenset[str]]) -> frozenset[str]:
    return frozenset[str]().union(*sets)
