"""What converting a model to PWS would do to each layer and norm, and why; and doing it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

from torch import nn

from pws._batch import Forward, example_of
from pws._errors import PwsError
from pws._files import write_whole
from pws.surgery._calibrate import Setting
from pws.surgery.branches import branch_ends
from pws.surgery.copying import copy_of
from pws.surgery.norms import affine_of, held_by, is_trained, norm_eps, scale_and_shift
from pws.surgery.plan_file import plan_text, read_plan
from pws.surgery.stand_ins import HOOKS, Affine, Copy
from pws.surgery.standardized import add_bias, is_standardized, standardize_layer, to_layers
from pws.surgery.warm_start import Match, Progress, absorb, output_error

Form = Literal["optimizer", "layers"]
FORMS: Final[tuple[Form, ...]] = ("optimizer", "layers")
ACTIONS: Final = ("standardize", "absorb", "remove", "affine", "keep", "skip")


@dataclass(frozen=True)
class Step:
    """What happens to one layer or norm."""

    name: str
    kind: str
    """Its class."""
    action: str
    """"standardize", "absorb" (a plain layer takes over its norm), "remove", "affine" (a scale and shift per channel stay),
    "keep" or "skip" (it can't be standardized)."""
    reason: str
    parameters: int
    """Before."""
    parameters_after: int


@dataclass(frozen=True)
class Plan:
    """What `pws.convert` would do; print it, then `apply` it."""

    steps: tuple[Step, ...]
    """In the order of execution; what did not run comes last."""
    gains: dict[str, float]
    biases: frozenset[str]
    """Layers that get one."""
    gamma: float
    relative_gamma: bool
    pairs: dict[str, str]
    """Each norm that is taken out right behind a layer, to the layer."""
    fixed: frozenset[str]
    """Norms of the input, whose scale and shift no training changes."""
    in_place: frozenset[str]
    """Activations that write over the input or output of a norm that is taken out."""
    aliased: frozenset[str]
    """Norms without which another tensor would be changed: what takes their place copies."""
    selected: frozenset[str]
    """Layers whose inputs the model's numbers select: a detector's regions."""
    ends: frozenset[str]
    """Layers and norms that nothing but the output is behind."""
    warm_start: bool
    form: Form
    model: nn.Module | None = None
    """What is converted: the model given, or a copy whose lazy layers have got their shapes; None for a plan from a file."""
    example: Any = None
    progress: Progress | None = None
    forward: Forward | None = None
    """Runs the model on the example, where that has another form."""

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, without the model and the example: `Plan.load` reads it."""
        write_whole(Path(path), plan_text(self))

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan from a file that `save` wrote.

        `apply(model)` builds the converted model from the original architecture, without data. Then load the converted weights.

        Raises:
            PwsError: the file holds no plan.
        """
        return read_plan(Plan, Step, path)

    def named(self, action: str) -> list[str]:
        """The layers and norms with which this happens."""
        return [step.name for step in self.steps if step.action == action]

    def __str__(self) -> str:
        """A table, then the totals."""
        rows = [("layer", "class", "what", "why"), *((s.name, s.kind, s.action, s.reason) for s in self.steps)]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows]
        counts = ", ".join(f"{action} {len(names)}" for action in ACTIONS if (names := self.named(action)))
        if self.model is None:
            return "\n".join([*lines, "", counts])
        before = sum(p.numel() for p in self.model.parameters())
        lines += ["", f"{counts}; parameters {before:,} before, {self.parameters_after:,} after"]
        return "\n".join([*lines, *self._warm_start_lines()])

    def _warm_start_lines(self) -> list[str]:
        """The error of the fit; before it, when it comes: printing a plan takes no minutes."""
        if not self.warm_start:
            return []
        if self.output_error is None:
            return ["warm start: not fitted yet; fit() or apply() fits the layers, then this line states the error"]
        return [f"warm start: outputs differ by {100 * self.output_error:.3g} % of their deviation on the example"]

    @property
    def parameters_after(self) -> int:
        """The number of parameters of the converted model; it needs a plan with its model."""
        changed = sum(step.parameters_after - step.parameters for step in self.steps)
        return sum(p.numel() for p in self._own_model.parameters()) + changed

    @property
    def _own_model(self) -> nn.Module:
        if self.model is None:
            raise PwsError(
                "a plan from a file holds no model: give one of the planned architecture, plan.apply(model)."
            )
        return self.model

    def _model_with_numbers(self) -> nn.Module:
        if any(tensor.is_meta for tensor in self._own_model.parameters()):
            raise PwsError(
                "kernels are set from numbers, and this model has none (device meta). Convert it with calibrate=False, or give "
                "it memory and weights first: model.to_empty(device=...), model.load_state_dict(...)."
            )
        return self._own_model

    def apply(self, model: nn.Module | None = None, *, calibrate: bool = True) -> nn.Module:
        """Make the converted copy; the model is left alone.

        Each layer to standardize keeps its class and gets a mark, and its weight becomes the kernel of alpha 1. An optimizer
        of `pws.optim` keeps it standardized. With `form="layers"` the layers become pws layers of the same kernels.

        With a warm start, kernels and biases are fitted to what the model computes. The fit happens once, at the first
        `apply` or `fit`, so later changes of the model do not count.

        Else, with `calibrate`, the kernels are scaled on the example, in the order of execution. Each standardized layer's
        output then has variance 1, and those of all residual branches together too. `pws.calibrate` does it again on better
        data. Without `calibrate` neither is done: load the weights from a checkpoint.

        Args:
            model: another of the same architecture, which is converted without fit or calibration: a plan from a file needs it.
            calibrate: scale the kernels on the example.

        Raises:
            PwsError: a layer's output does not vary on the example, or the model given is of another architecture.
        """
        if model is not None or not calibrate:
            result = self._converted(self._own_model if model is None else model)
        elif self.warm_start:
            result = deepcopy(self._fit[0])
        else:
            result = self._calibrated()
        if self.form == "layers":
            to_layers(result)
        return result

    @property
    def output_error(self) -> float | None:
        """The error of a fitted warm start: root mean square of the difference of what the last layers give on the example, in
        units of its deviation. With few images it is too small, because the fit has seen them. None before the fit."""
        return self._fit[1] if "_fit" in vars(self) else None

    def fit(self) -> float:
        """Fit the layers of a warm start, and return `output_error`. It happens once; `apply` does it too.

        Raises:
            PwsError: the plan is without a warm start or a model, or the model's numbers can't be fitted.
        """
        if not self.warm_start:
            raise PwsError("only a warm start is fitted: make the plan with pws.plan(model, example, warm_start=True).")
        return self._fit[1]

    @cached_property
    def _fit(self) -> tuple[nn.Module, float]:
        """A marked copy whose layers give what layer and norm gave, as nearly as filters of mean zero can on the example; and
        its `output_error`."""
        model = self._model_with_numbers()
        result = self._converted(model)
        for norm, layer in self.pairs.items():
            if layer in self.named("absorb"):
                absorb(result.get_submodule(layer), model.get_submodule(norm))
        norms = {layer: model.get_submodule(norm) for norm, layer in self.pairs.items()}
        affines = {name: affine_of(norms[name]) if name in norms else None for name in self.named("standardize")}
        Match(model, result, affines, self.selected, self.progress).run(self.run_example)
        return result, output_error(model, result, self.ends, self.run_example)

    def _calibrated(self) -> nn.Module:
        model = self._model_with_numbers()
        result = self._converted(model)
        names = {m: n for n, m in result.named_modules() if is_standardized(m)}
        setting = Setting(names, 1.0, False, None)
        untrained = {n: norm for n in self.fixed if not is_trained(norm := model.get_submodule(n))}
        setting.affines = {_affine_in(result.get_submodule(n)): norm_eps(norm) for n, norm in untrained.items()}
        if setting.names or setting.affines:
            setting.shares = branch_ends(result, example_of(result, self.example, self.forward), names.values())
            setting.run(result, lambda: self.run_example(result))
        return result

    def run_example(self, model: nn.Module) -> Any:
        """The outputs of a model on the example."""
        return example_of(model, self.example, self.forward).outputs(model)

    def _converted(self, model: nn.Module) -> nn.Module:
        self._check(model)
        result = copy_of(model)
        modules = dict(result.named_modules())
        for name in self.named("standardize"):
            standardize_layer(
                modules[name],
                gain=self.gains[name],
                gamma=self.gamma,
                relative_gamma=self.relative_gamma,
                bias=name in self.biases,
            )
        for name in self.named("absorb"):
            add_bias(modules[name])
        # Without the norm they would write over its input, which others may take: a residual stream.
        for name in self.in_place:
            modules[name].inplace = False
        without = {
            modules[n]: self._without_norm(n, modules[n]) for n in (*self.named("remove"), *self.named("affine"))
        }
        for parent in list(result.modules()):
            for name, child in parent._modules.items():
                if child in without:
                    parent._modules[name] = without[child]
        return without.get(result, result)

    def _check(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        for step in self.steps:
            found = type(modules[step.name]).__name__ if step.name in modules else "nothing"
            if found != step.kind:
                raise PwsError(
                    f"a plan is applied to the architecture that was planned, not yet converted; at {step.name!r} it has a "
                    f"{step.kind}, this model {found}. Build the same model, or plan this one."
                )

    def _without_norm(self, name: str, norm: nn.Module) -> nn.Module:
        """What is left of a norm: nothing, a copy, its scale and shift, or the activation of a module that holds one (timm's
        BatchNormAct2d)."""
        rest = held_by(norm)
        for module in rest:
            if hasattr(module, "inplace"):
                module.inplace = False  # type: ignore[assignment]
        if name in self.named("affine"):
            rest = [Affine(*scale_and_shift(norm), fixed=name in self.fixed), *rest]
        hooks = {key: value for key, value in vars(norm).items() if key in HOOKS and value}
        rest = [*rest, Copy()] if not rest and (name in self.aliased or hooks) else rest
        stand_in = nn.Sequential(*rest) if len(rest) > 1 else next(iter(rest), nn.Identity())
        vars(stand_in).update(hooks)
        if name in self.pairs:
            vars(stand_in)["pws_layer_before"] = self.pairs[name]
        return stand_in


def _affine_in(module: nn.Module) -> Affine:
    return next(found for found in module.modules() if isinstance(found, Affine))
