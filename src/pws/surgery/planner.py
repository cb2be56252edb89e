"""Which layers and norms of a traced model are standardized, taken out or left alone."""

from __future__ import annotations

from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from typing import Any, Final

from torch import nn

from pws._batch import Forward
from pws._errors import ShapeError
from pws._gain import variance_preserving_gain
from pws._layers import StandardizedLayer
from pws._mark import mark_of
from pws._standardize import check_fan_in
from pws.surgery._plan import Form, Plan, Step
from pws.surgery.norms import affine_of, channels_of, has_own_forward, is_frozen
from pws.surgery.standardized import own_filters, own_weight, parent_of, varies
from pws.surgery.value import COMPUTED, INPUT, OUTPUT, Trace, Value
from pws.surgery.warm_start import Progress

_ON_INPUT: Final = (
    "keep",
    "it sees the input, whose mean (the brightness of images) centred filters would lose",
)
_DEPTHWISE: Final = ("keep", "its filters see one channel each, whose mean centred filters would lose")
_PREDICTS: Final = ("keep", "it predicts: no norm is behind it, and its outputs keep their scale")
_IS_LAYER: Final = ("keep", "it is a pws layer")
_IS_MARKED: Final = ("keep", "it is marked")
_PLAIN: Final = (_ON_INPUT, _DEPTHWISE)
"""What a warm start leaves as it is, but without its norm."""

Selector = str | type[nn.Module] | Callable[[str, nn.Module], bool]
"""A name or pattern, a class, or a predicate of name and module."""


class Planner:
    """Decides about each module of a traced model."""

    def __init__(
        self,
        model: nn.Module,
        run: Trace,
        is_norm: Callable[[nn.Module], bool],
        keep: list[Selector],
        chosen: list[Selector],
        *,
        warm_start: bool,
        form: Form,
    ) -> None:
        self.run, self.is_norm, self.keep, self.warm_start, self.form = run, is_norm, keep, warm_start, form
        self.chosen = chosen
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
        self.gone: set[str] = set()

    def plan(
        self, gamma: float, relative_gamma: bool, example: Any, progress: Progress | None, forward: Forward | None
    ) -> Plan:
        """The plan; arguments as those of `pws.plan`."""
        norms = {name: self._norm(name) for name in self.norms}
        removed = {name for name, (action, _) in norms.items() if action == "remove"}
        self.gone = {name for name, (action, _) in norms.items() if action != "keep"}
        layers = {name: self._layer(name) for name in self.layers}
        chosen = [name for name, (action, _) in layers.items() if action == "standardize"]
        takes_over = [*chosen, *(name for name in self.layers if self.refusals[name] in _PLAIN)]
        pairs = {name: layer for name in removed if (layer := self._right_before(name)) in takes_over}
        absorbing = set(pairs.values()) - set(chosen)
        layers |= {n: ("absorb", f"{layers[n][1]}; it takes over the norm") for n in absorbing}
        needs_bias = [*chosen, *pairs.values()] if self.warm_start else list(filter(self._gets_bias, chosen))
        biases = frozenset(name for name in needs_bias if self.modules[name].bias is None)
        decided = norms | layers
        affine = {name for name, (action, _) in norms.items() if action == "affine"}
        if self.warm_start:
            affine |= removed - set(pairs)
            decided |= {n: ("affine", f"{norms[n][1]}; its scale and shift stay") for n in affine & removed}
        steps = [self._step(n, *decided[n], bias=n in biases) for n in self.inputs]
        steps += [
            self._step(name, "keep", "it did not run on the example")
            for name, module in self.modules.items()
            if self.is_norm(module) and name not in norms
        ]
        # A layer's output is its own: whoever gets it may write over it.
        returned = {name for name in self.run.returned if not self._reads_alone(name)}
        return Plan(
            steps=tuple(steps),
            model=self.model,
            gains={name: self._gain(name) for name in chosen},
            biases=biases,
            gamma=gamma,
            relative_gamma=relative_gamma,
            example=example,
            pairs=pairs,
            fixed=frozenset(affine - removed),
            in_place=frozenset(name for name, written in self.run.in_place.items() if written & self.gone),
            aliased=frozenset((self.run.aliased | returned) & self.gone),
            selected=frozenset(n for n in self.layers if any(value.selected for value in self.inputs[n])),
            ends=frozenset(filter(self._is_end, self.inputs)),
            warm_start=self.warm_start,
            form=self.form,
            progress=progress,
            forward=forward,
        )

    def _is_end(self, name: str) -> bool:
        """Whether nothing but the model's output takes its output, and the same entries of it on every run."""
        is_gate = name in self.run.gates
        selected = any(value.selected for value in self.inputs[name])
        return self.run.takers.get(name, set()) <= {OUTPUT} and not selected and not is_gate

    def _right_before(self, norm: str) -> str:
        """The layer whose output only this norm takes, once, and nothing else, along the same channels; "" if there is none."""
        if not self._reads_alone(norm) or len(self.inputs[norm]) > 1:
            return ""
        (layer,) = self.inputs[norm][0].sources
        is_other_axis = self.run.dims[norm] > 2 and isinstance(self.modules[layer], nn.Linear)
        return "" if is_other_axis or len(self.inputs[layer]) > 1 else layer

    def _reads_alone(self, norm: str) -> bool:
        """Whether it takes the output of one layer as it is, and nothing else takes that."""
        for value in self.inputs[norm]:
            layer = min(value.sources, default=INPUT)
            if len(value.sources) != 1 or value.steps or layer not in self.layers or self.run.takers[layer] != {norm}:
                return False
        return True

    def _refusal(self, name: str) -> tuple[str, str] | None:
        """Action and reason for a layer that can't or must not be standardized."""
        module = self.modules[name]
        if self._is_among(name, self.keep):
            return "keep", "asked for"
        if isinstance(module, StandardizedLayer):
            return _IS_LAYER
        if mark_of(module) is not None:
            return _IS_MARKED
        if name in self.run.foreign or parent_of(module) is None:
            return "skip", "its forward does not convolve with its weight as it is"
        if hasattr(module, "alpha"):
            return "skip", "it has an alpha of its own"
        if own_weight(module).is_complex():
            return "skip", "its weight is complex"
        # One kernel can't have the scales of several layers, and a plain module wants none of it.
        others = [holder for holder in self.holders[own_weight(module)] if holder != name]
        if others:
            return "skip", f"its weight is that of {others[0]} too"
        try:
            check_fan_in(own_filters(module))
        except ShapeError:
            return "skip", "its filters have one entry each: no variance"
        if not own_weight(module).is_meta and not varies(own_filters(module)):
            return "keep", "its filters are constant, 0 for example: without a mean nothing of them is left"
        # Where the input's mean is zero, so is the average gradient: nothing shifts these filters.
        if self.warm_start and all(value.sources == {INPUT} for value in self.inputs[name]):
            return _ON_INPUT
        groups: Any = getattr(module, "groups", 1)
        return _DEPTHWISE if self.warm_start and groups > 1 and groups == module.in_channels else None

    def _is_among(self, name: str, selectors: list[Selector]) -> bool:
        module = self.modules[name]
        for rule in selectors:
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
        if self._is_among(name, self.keep):
            return "keep", "asked for"
        if has_own_forward(self.modules[name]):
            return "keep", "its forward is not torch's: what else it does would be lost"
        if self.warm_start and affine_of(self.modules[name]) is None:
            return "keep", "it has no running statistics that a layer could take over"
        if obstacle := self._obstacle(name):
            return "keep", obstacle
        sources = self._sources(name)
        if sources == {INPUT}:
            return "affine", "it sees the input, nothing else: a fixed scale and shift stay"
        behind = sorted(sources - set(self.norms) - {INPUT})
        steps = frozenset[str]().union(*(value.steps for value in self.inputs[name]))
        return "remove", f"behind {_list(behind) or 'another norm'}{_through(steps)}"

    def _sources(self, norm: str) -> frozenset[str]:
        return frozenset[str]().union(*(value.sources for value in self.inputs[norm]))

    def _obstacle(self, norm: str) -> str:
        """Why nothing would do the norm's work without it; "" if something would."""
        if not all(value.is_known for value in self.inputs[norm]):
            return "where its input comes from can't be followed"
        sources, frozen = self._sources(norm), is_frozen(self.modules[norm])
        parameters = sources.difference(self.norms, self.layers, {INPUT}).union(
            *(value.parameters for value in self.inputs[norm])
        )
        if COMPUTED in parameters:
            return "it normalizes what was made with a computed kernel, outside of a layer's own call"
        if parameters:
            return f"it normalizes what was made with the parameter {min(parameters)}, outside of a layer's own call"
        behind = sorted(sources - set(self.norms) - {INPUT})
        harmless = (None, _IS_LAYER, _IS_MARKED, *_PLAIN)
        refused = [layer for layer in behind if self.refusals[layer] not in harmless]
        if refused:
            return f"it normalizes {refused[0]}, which stays as it is: {(self.refusals[refused[0]] or '')[1]}"
        if frozen and behind and not any(own_weight(self.modules[layer]).requires_grad for layer in behind):
            return f"it is frozen, and so is {_list(behind)}"
        return ""

    def _layer(self, name: str) -> tuple[str, str]:
        refusal = self.refusals[name]
        if refusal:
            return refusal
        if self._is_among(name, self.chosen):
            return "standardize", "asked for"
        norms = sorted(self.run.takers.get(name, set()) & self.gone)
        if norms:
            return "standardize", f"its output went to {_list(norms)}"
        if name in self.gates:
            return "keep", "it makes a gate, which is not normalized"
        sources = frozenset[str]().union(*(value.sources for value in self.inputs[name]))
        if not sources & self.gone:
            return "keep", "no norm that is taken out stands beside it"
        if self._predicts(name):
            return _PREDICTS
        return "standardize", f"its input came from {_list(sorted(sources & self.gone))}"

    def _predicts(self, name: str) -> bool:
        """Whether its output reaches no norm."""
        seen, new = set[str](), {name}
        while new:
            seen |= new
            new = set[str]().union(*(self.run.takers.get(layer, set()) for layer in new)) - seen - {OUTPUT}
        return not seen & set(self.norms)

    def _gets_bias(self, name: str) -> bool:
        takers = self.run.takers.get(name, set()) & self.gone
        return any(getattr(self.modules[norm], "bias", None) is not None for norm in takers)

    def _gain(self, name: str) -> float:
        value = self.inputs[name][0]
        if value.activation:
            return variance_preserving_gain(value.activation)
        return variance_preserving_gain("linear")

    def _step(self, name: str, action: str, reason: str, *, bias: bool = False) -> Step:
        module = self.modules[name]
        before = sum(p.numel() for p in module.parameters(recurse=False))
        after = 0 if action == "remove" else before
        if action == "affine":
            after = 2 * channels_of(module)
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
