"""What converting a model to PWS would do to each layer and norm, and why; and doing it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Final

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from pws.diagnosis.batch import batch_of
from pws.errors import PwsError, ShapeError, UnknownNameError
from pws.gain import variance_preserving_gain
from pws.layers import StandardizedLayer
from pws.standardize import check_fan_in, check_gamma
from pws.surgery.branches import branch_ends
from pws.surgery.calibrate import Setting
from pws.surgery.standardized import parent_of, standardize_layer
from pws.surgery.trace import INPUT, Trace, Value, trace
from pws.surgery.warm_start import affine_layer, affine_of, match, output_error, scale_alpha

Keep = str | type[nn.Module] | Callable[[str, nn.Module], bool]


def _named(name: str) -> Callable[[nn.Module], bool]:
    """Classes that several libraries have, without a common base."""
    return lambda module: any(cls.__name__ == name for cls in type(module).__mro__)


NORMS: Final[dict[str, tuple[Callable[[nn.Module], bool], ...]]] = {
    "batch": (
        lambda m: isinstance(m, _BatchNorm) and not isinstance(m, _InstanceNorm),
        *(_named(name) for name in ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")),
    ),
    "group": (lambda m: isinstance(m, nn.GroupNorm) and m.num_groups > 1,),
    "layer": (_named("LayerNorm2d"), lambda m: isinstance(m, nn.GroupNorm) and m.num_groups == 1),
    "instance": (lambda m: isinstance(m, _InstanceNorm),),
}
"""The families of norms that can be taken out."""
ACTIONS: Final = ("standardize", "remove", "keep", "skip")


@dataclass(frozen=True)
class Step:
    """What happens to one layer or norm."""

    name: str
    kind: str
    """Its class."""
    action: str
    """"standardize", "remove", "keep" or "skip" (a layer that can't be standardized)."""
    reason: str
    parameters: int
    """Before."""
    parameters_after: int


@dataclass(frozen=True)
class Plan:
    """What `pws.convert` would do; print it, then `apply` it."""

    steps: tuple[Step, ...]
    """In the order of execution; what did not run comes last."""
    model: nn.Module
    """What is converted: the model given, or a copy whose lazy layers have got their shapes."""
    gains: dict[str, float]
    biases: frozenset[str]
    gamma: float
    relative_gamma: bool
    example: Any
    pairs: dict[str, str]
    """Each norm that is taken out right behind a layer, to the layer."""
    dims: dict[str, int]
    """Of the inputs of norms."""
    warm_start: bool
    output_error: float | None = None
    """With a warm start: root mean square of the outputs' difference on the example, in units of the outputs' deviation."""

    def named(self, action: str) -> list[str]:
        """The layers and norms with which this happens."""
        return [step.name for step in self.steps if step.action == action]

    def __str__(self) -> str:
        """A table, then the totals."""
        rows = [("layer", "class", "what", "why"), *((s.name, s.kind, s.action, s.reason) for s in self.steps)]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows]
        counts = ", ".join(f"{action} {len(self.named(action))}" for action in ACTIONS)
        before = sum(p.numel() for p in self.model.parameters())
        lines += ["", f"{counts}; parameters {before:,} before, {self.parameters_after:,} after"]
        if self.output_error is not None:
            lines.append(
                f"warm start: outputs differ by {100 * self.output_error:.3g} % of their deviation on the example"
            )
        return "\n".join(lines)

    @property
    def parameters_after(self) -> int:
        """Of the converted model."""
        changed = sum(step.parameters_after - step.parameters for step in self.steps)
        return sum(p.numel() for p in self.model.parameters()) + changed

    def apply(self, *, calibrate: bool = True) -> nn.Module:
        """A converted copy; the model is left alone.

        With a warm start, alpha and bias take over the norms' statistics and affine. Else, with `calibrate`, alpha is set on
        the example, in the order of execution, so that each standardized layer's output has variance 1, and those of all
        residual branches together as much: what the norms saw to. (`pws.calibrate` does it again on better data.) Without
        `calibrate` alpha is 1: the model is to be loaded from a checkpoint.

        Raises:
            PwsError: a layer's output does not vary on the example.
        """
        result = self._converted()
        if self.warm_start and calibrate:
            layers = self.named("standardize")
            norms = {layer: self.model.get_submodule(norm) for norm, layer in self.pairs.items()}
            affines = {name: affine_of(norms[name]) if name in norms else None for name in layers}
            for name, affine in affines.items():
                layer = result.get_submodule(name)
                assert isinstance(layer, StandardizedLayer)
                scale_alpha(layer, torch.ones_like(layer.alpha) if affine is None else affine[0])
            match(self.model, result, affines, self._run)
        elif calibrate and self.named("standardize"):
            names = {m: n for n, m in result.named_modules() if isinstance(m, StandardizedLayer)}
            setting = Setting(names, 1.0, False, None, branch_ends(result, self.example))
            setting.run(result, lambda: self._run(result))
        return result

    def _run(self, model: nn.Module) -> Any:
        return batch_of((self.example,)).outputs(model)

    def _converted(self) -> nn.Module:
        result = deepcopy(self.model)
        modules = dict(result.named_modules())
        for name in self.named("standardize"):
            standardize_layer(
                modules[name],
                gain=self.gains[name],
                gamma=self.gamma,
                relative_gamma=self.relative_gamma,
                bias=name in self.biases,
            )
        without = {modules[name]: self._without_norm(name, modules[name]) for name in self.named("remove")}
        for parent in list(result.modules()):
            for name, child in parent._modules.items():
                if child in without:
                    parent._modules[name] = without[child]
        return without.get(result, result)

    def _without_norm(self, name: str, norm: nn.Module) -> nn.Module:
        """What is left of a norm: nothing, or the activation of a module that holds one (timm's BatchNormAct2d); with a warm
        start its scale and shift too, where no layer takes them over."""
        held = [getattr(norm, part, None) for part in ("drop", "act")]
        rest = [module for module in held if isinstance(module, nn.Module) and not isinstance(module, nn.Identity)]
        affine = affine_layer(norm, self.dims[name] - 2) if self.warm_start and name not in self.pairs else None
        rest = [affine, *rest] if affine is not None else rest
        return nn.Sequential(*rest) if len(rest) > 1 else next(iter(rest), nn.Identity())


def plan(
    model: nn.Module,
    example: Any,
    *,
    norms: Collection[str] = ("batch",),
    keep: Keep | Collection[Keep] = (),
    gamma: float = 1e-3,
    relative_gamma: bool = False,
    warm_start: bool = False,
) -> Plan:
    """What converting `model` to PWS would do, found by running a copy of it once on `example`.

    A layer is standardized if its output goes into a norm that is taken out, whatever stands between them (an activation, an
    addition, a concatenation), or if it takes such a norm's output (pre-activation networks, heads), unless all that it does
    is to scale another tensor (squeeze and excitation). A norm stays if it was asked for, did not run, or normalizes a layer
    that can't be standardized.

    Args:
        model: any module. It is left alone.
        example: what its forward takes: a tensor, or a tuple or dict of all arguments. Any batch size.
        norms: which families are taken out: "batch" (BatchNorm of all dimensions, synchronized, frozen, with activation),
            "group", "layer" (of images), "instance".
        keep: layers and norms to leave alone: names or patterns (`layer4.*`), classes, or a predicate of name and module.
        gamma: of the pws layers.
        relative_gamma: of the pws layers.
        warm_start: the model is trained, and what it computes is to be kept as closely as zero-mean filters allow: alpha and
            bias are fitted to its outputs on the example, which should then be some hundred real images. The plan states the
            error that is left; a short fine-tuning takes it away.

    Raises:
        PwsError: the model can't be run on the example, or has no norm of these families.
        UnknownNameError: no such family of norms.
    """
    check_gamma(gamma)
    for family in norms:
        if family not in NORMS:
            raise UnknownNameError("family of norms", family, NORMS)
    tests = [test for family in norms for test in NORMS[family]]

    def is_norm(module: nn.Module) -> bool:
        return any(test(module) for test in tests)

    if not any(map(is_norm, model.modules())):
        raise PwsError(
            f"{type(model).__name__} has no norm to take out: none of the families {', '.join(norms)}. "
            "Others are chosen by norms=: " + ", ".join(NORMS) + "."
        )
    run = trace(model, example, is_norm)
    kept = [keep] if isinstance(keep, str | type) or callable(keep) else list(keep)
    made = _Planner(model, run, is_norm, kept).plan(gamma, relative_gamma, example, warm_start=warm_start)
    if not warm_start:
        return made
    return replace(made, output_error=output_error(made.model, made.apply(), made._run))


def convert(model: nn.Module, example: Any, *, calibrate: bool = True, **settings: Any) -> nn.Module:
    """A copy of `model` that trains without its norms: `plan(model, example, **settings).apply(calibrate=calibrate)`.

    Args:
        model: any module. It is left alone.
        example: what its forward takes; a batch of real data, if alpha is calibrated on it.
        calibrate: set alpha on the example, so that each layer keeps the variance that its norm saw to.
        settings: those of `pws.plan`: `norms`, `keep`, `gamma`, `relative_gamma`, `warm_start`.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> convert(model, torch.randn(2, 3, 8, 8))
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), gamma=0.001, gain=1)
          (1): Identity()
          (2): ReLU()
        )
    """
    return plan(model, example, **settings).apply(calibrate=calibrate)


class _Planner:
    """Decides about each module of a traced model."""

    def __init__(self, model: nn.Module, run: Trace, is_norm: Callable[[nn.Module], bool], keep: list[Keep]) -> None:
        self.run, self.is_norm, self.keep = run, is_norm, keep
        self.modules = dict(run.model.named_modules())
        lazy = any(isinstance(m, nn.modules.lazy.LazyModuleMixin) for m in model.modules())
        self.model = run.model if lazy else model
        self.inputs: dict[str, list[Value]] = {}
        for use in run.uses:
            self.inputs.setdefault(use.name, []).append(use.input)
        self.layers = list(dict.fromkeys(use.name for use in run.uses if not use.is_norm))
        self.norms = list(dict.fromkeys(use.name for use in run.uses if use.is_norm))
        self.refusals = {name: self._refusal(name) for name in self.layers}
        self.gates = self._gates()
        self.removed: set[str] = set()

    def plan(self, gamma: float, relative_gamma: bool, example: Any, *, warm_start: bool) -> Plan:
        norms = {name: self._norm(name, warm_start=warm_start) for name in self.norms}
        self.removed = {name for name, (action, _) in norms.items() if action == "remove"}
        layers = {name: self._layer(name) for name in self.layers}
        chosen = [name for name, (action, _) in layers.items() if action == "standardize"]
        biases = frozenset(n for n in chosen if self._gets_bias(n) or (warm_start and self.modules[n].bias is None))
        pairs = {name: layer for name in self.removed if (layer := self._right_before(name)) in chosen}
        decided = norms | layers
        affine = self.removed - set(pairs) if warm_start else set()
        steps = [self._step(n, *decided[n], bias=n in biases, affine=n in affine) for n in self.inputs]
        steps += [
            self._step(name, "keep", "it did not run on the example")
            for name, module in self.modules.items()
            if self.is_norm(module) and name not in norms
        ]
        gains = {name: self._gain(name) for name in chosen}
        rest = (example, pairs, self.run.dims, warm_start)
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
            return "keep", "it is a pws layer"
        if name in self.run.foreign or parent_of(module) is None:
            return "skip", "its forward does not convolve with its weight as it is"
        try:
            weight: Any = module.weight
            check_fan_in(weight.transpose(0, 1) if getattr(module, "transposed", False) else weight)
        except ShapeError:
            return "skip", "its filters have one entry each: no variance"
        return None

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

    def _norm(self, name: str, *, warm_start: bool) -> tuple[str, str]:
        if self._is_kept(name):
            return "keep", "asked for"
        if warm_start and affine_of(self.modules[name]) is None:
            return "keep", "it has no running statistics that a layer could take over"
        sources = frozenset[str]().union(*(value.sources for value in self.inputs[name]))
        behind = sorted(sources - set(self.norms) - {INPUT})
        refused = [layer for layer in behind if self.refusals[layer] not in (None, ("keep", "it is a pws layer"))]
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
        has_bias = any(getattr(self.modules[norm], "bias", None) is not None for norm in takers)
        return has_bias and self.modules[name].bias is None

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
        if action == "standardize":
            weight: Any = module.weight
            transposed = getattr(module, "transposed", False)
            channels: Any = module.out_channels if transposed else len(weight)
            after += int(channels) * (1 + bias)
        return Step(name, type(module).__name__, action, reason, before, after)


def _list(names: Collection[str], most: int = 2) -> str:
    names = list(names)
    more = len(names) - most
    return ", ".join(names) if more <= 0 else f"{', '.join(names[:most])} and {more} more"


def _through(steps: Collection[str]) -> str:
    words = {"activation": "an activation", "sum": "an addition", "join": "a concatenation", "product": "a product"}
    passed = [word for step, word in words.items() if step in steps]
    return f", through {' and '.join(passed)}" if passed else ""
