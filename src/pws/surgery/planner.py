"""Which layers and norms of a traced model are standardized, taken out or left alone."""

from __future__ import annotations

from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from typing import Any, Final

from torch import nn

from pws.errors import ShapeError
from pws.gain import variance_preserving_gain
from pws.layers import StandardizedLayer
from pws.mark import mark_of
from pws.standardize import check_fan_in
from pws.surgery.plan import Form, Plan, Step
from pws.surgery.standardized import own_filters, own_weight, parent_of
from pws.surgery.trace import INPUT, Trace, Value
from pws.surgery.warm_start import Progress, affine_layer, affine_of

_ON_INPUT: Final = (
    "keep",
    "it sees the input, whose mean (the brightness of images) centred filters would lose",
)
_DEPTHWISE: Final = ("keep", "its filters see one channel each, whose mean centred filters would lose")
_IS_LAYER: Final = ("keep", "it is a pws layer")
_IS_MARKED: Final = ("keep", "it is marked")
_PLAIN: Final = (_ON_INPUT, _DEPTHWISE)
"""What a warm start leaves as it is, but without its norm."""

Keep = str | type[nn.Module] | Callable[[str, nn.Module], bool]


class Planner:
    """Decides about each module of a traced model."""

    def __init__(
        self,
        model: nn.Module,
        run: Trace,
        is_norm: Callable[[nn.Module], bool],
        keep: list[Keep],
        *,
        warm_start: bool,
        form: Form,
    ) -> None:
        self.run, self.is_norm, self.keep, self.warm_start, self.form = run, is_norm, keep, warm_start, form
        self.modules = dict(run.model.named_modules())
        lazy = any(isinstance(m, nn.modules.lazy.LazyModuleMixin) for m in model.modules())
        self.model = run.model if lazy else model
        self.holders: dict[nn.Parameter, list[str]] = {}
        for name, module in self.modules.items():
            for parameter in module.parameters(recurse=False):
                self.holders.setdefault(parameter, []).append(name)
        self.inputs: dict[str, list[Value]] = {}
        for use in run.uses:
            self.inputs.setdefault(use.name, []).append(use.input)
        self.layers = list(dict.fromkeys(use.name for use in run.uses if not use.is_norm))
        self.norms = list(dict.fromkeys(use.name for use in run.uses if use.is_norm))
        self.refusals = {name: self._refusal(name) for name in self.layers}
        self.gates = self._gates()
        self.removed: set[str] = set()

    def plan(self, gamma: float, relative_gamma: bool, example: Any, progress: Progress | None) -> Plan:
        """The plan; arguments as those of `pws.plan`."""
        norms = {name: self._norm(name) for name in self.norms}
        self.removed = {name for name, (action, _) in norms.items() if action == "remove"}
        layers = {name: self._layer(name) for name in self.layers}
        chosen = [name for name, (action, _) in layers.items() if action == "standardize"]
        takes_over = [*chosen, *(name for name in self.layers if self.refusals[name] in _PLAIN)]
        pairs = {name: layer for name in self.removed if (layer := self._right_before(name)) in takes_over}
        absorbing = set(pairs.values()) - set(chosen)
        layers |= {n: ("absorb", f"{layers[n][1]}; it takes over the norm") for n in absorbing}
        needs_bias = [*chosen, *pairs.values()] if self.warm_start else list(filter(self._gets_bias, chosen))
        biases = frozenset(name for name in needs_bias if self.modules[name].bias is None)
        decided = norms | layers
        affine = self.removed - set(pairs) if self.warm_start else set()
        steps = [self._step(n, *decided[n], bias=n in biases, affine=n in affine) for n in self.inputs]
        steps += [
            self._step(name, "keep", "it did not run on the example")
            for name, module in self.modules.items()
            if self.is_norm(module) and name not in norms
        ]
        gains = {name: self._gain(name) for name in chosen}
        in_place = frozenset(name for name, written in self.run.in_place.items() if written & self.removed)
        copied = frozenset(self.run.overwritten & self.removed)
        rest = (example, pairs, self.run.dims, in_place, copied, self.warm_start, self.form, progress)
        return Plan(tuple(steps), self.model, gains, biases, gamma, relative_gamma, *rest)

    def _right_before(self, norm: str) -> str:
        """The layer whose output only this norm takes, and nothing else; "" if there is none."""
        value = self.inputs[norm][0]
        if len(self.inputs[norm]) > 1 or len(value.sources) != 1 or value.steps:
            return ""
        (layer,) = value.sources
        alone = self.run.takers.get(layer) == {norm} and len(self.inputs.get(layer, ())) == 1
        return layer if alone else ""

    def _refusal(self, name: str) -> tuple[str, str] | None:
        """Action and reason for a layer that can't or must not be standardized."""
        module = self.modules[name]
        if self._is_kept(name):
            return "keep", "asked for"
        if isinstance(module, StandardizedLayer):
            return _IS_LAYER
        if mark_of(module) is not None:
            return _IS_MARKED
        if name in self.run.foreign or parent_of(module) is None:
            return "skip", "its forward does not convolve with its weight as it is"
        if hasattr(module, "alpha"):
            return "skip", "it has an alpha of its own"
        # One kernel can't have the scales of several layers, and a plain module wants none of it.
        others = [holder for holder in self.holders[own_weight(module)] if holder != name]
        if others:
            return "skip", f"its weight is that of {others[0]} too"
        try:
            check_fan_in(own_filters(module))
        except ShapeError:
            return "skip", "its filters have one entry each: no variance"
        # Where the input's mean is zero, so is the average gradient: nothing shifts these filters.
        if self.warm_start and all(value.sources == {INPUT} for value in self.inputs[name]):
            return _ON_INPUT
        groups: Any = getattr(module, "groups", 1)
        return _DEPTHWISE if self.warm_start and groups > 1 and groups == module.in_channels else None

    def _is_kept(self, name: str) -> bool:
        module = self.modules[name]
        for rule in self.keep:
            if isinstance(rule, str):
                found = fnmatchcase(name, rule)
            elif isinstance(rule, type):
                found = isinstance(module, rule)
            else:
                found = bool(rule(name, module))
            if found:
                return True
        return False

    def _gates(self) -> set[str]:
        """Layers whose output only scales another tensor, themselves or through layers that do."""
        gates = {name for name in self.run.gates if name in self.layers}
        while True:
            more = {name for name in self.layers if self.run.takers.get(name, {"nothing"}) <= gates} - gates
            if not more:
                return gates
            gates |= more

    def _norm(self, name: str) -> tuple[str, str]:
        if self._is_kept(name):
            return "keep", "asked for"
        if self.warm_start and affine_of(self.modules[name]) is None:
            return "keep", "it has no running statistics that a layer could take over"
        sources = frozenset[str]().union(*(value.sources for value in self.inputs[name]))
        behind = sorted(sources - set(self.norms) - {INPUT})
        harmless = (None, _IS_LAYER, _IS_MARKED, *_PLAIN)
        refused = [layer for layer in behind if self.refusals[layer] not in harmless]
        if refused:
            return "keep", f"it normalizes {refused[0]}, which stays as it is: {(self.refusals[refused[0]] or '')[1]}"
        steps = frozenset[str]().union(*(value.steps for value in self.inputs[name]))
        return "remove", f"behind {_list(behind) or 'the input'}{_through(steps)}"

    def _layer(self, name: str) -> tuple[str, str]:
        refusal = self.refusals[name]
        if refusal:
            return refusal
        norms = sorted(self.run.takers.get(name, set()) & self.removed)
        if norms:
            return "standardize", f"its output went to {_list(norms)}"
        sources = frozenset[str]().union(*(value.sources for value in self.inputs[name]))
        if name in self.gates:
            return "keep", "it makes a gate, which is not normalized"
        if sources & self.removed:
            return "standardize", f"its input came from {_list(sorted(sources & self.removed))}"
        return "keep", "no norm that is taken out stands beside it"

    def _gets_bias(self, name: str) -> bool:
        takers = self.run.takers.get(name, set()) & self.removed
        return any(getattr(self.modules[norm], "bias", None) is not None for norm in takers)

    def _gain(self, name: str) -> float:
        value = self.inputs[name][0]
        if value.activation:
            return variance_preserving_gain(value.activation)
        return variance_preserving_gain("linear")

    def _step(self, name: str, action: str, reason: str, *, bias: bool = False, affine: bool = False) -> Step:
        module = self.modules[name]
        before = sum(p.numel() for p in module.parameters(recurse=False))
        after = 0 if action == "remove" else before
        left = affine_layer(module, self.run.dims[name] - 2) if affine else None
        after += 0 if left is None else sum(p.numel() for p in left.parameters())
        if action in ("standardize", "absorb"):
            alpha = action == "standardize" and self.form == "layers"
            after += len(own_filters(module)) * (alpha + bias)
        return Step(name, type(module).__name__, action, reason, before, after)


def _list(names: Collection[str], most: int = 2) -> str:
    names = list(names)
    more = len(names) - most
    return ", ".join(names) if more <= 0 else f"{', '.join(names[:most])} and {more} more"


def _through(steps: Collection[str]) -> str:
    words = {"activation": "an activation", "sum": "an addition", "join": "a concatenation", "product": "a product"}
    passed = [word for step, word in words.items() if step in steps]
    return f", through {' and '.join(passed)}" if passed else ""
