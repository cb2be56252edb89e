"""What converting a model to PWS would do to each layer and norm, and why; and doing it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

from torch import Tensor, nn

from pws.diagnosis.batch import batch_of
from pws.surgery.branches import branch_ends
from pws.surgery.calibrate import Setting
from pws.surgery.copying import copy_of
from pws.surgery.standardized import add_bias, is_standardized, standardize_layer, to_layers
from pws.surgery.warm_start import Progress, absorb, affine_layer, affine_of, match, output_error

Form = Literal["optimizer", "layers"]
FORMS: Final[tuple[Form, ...]] = ("optimizer", "layers")
ACTIONS: Final = ("standardize", "absorb", "remove", "keep", "skip")


@dataclass(frozen=True)
class Step:
    """What happens to one layer or norm."""

    name: str
    kind: str
    """Its class."""
    action: str
    """"standardize", "absorb" (a plain layer takes over its norm), "remove", "keep" or "skip" (it can't be standardized)."""
    reason: str
    parameters: int
    """Before."""
    parameters_after: int


class Copy(nn.Module):
    """Takes the place of a norm whose output is written over: that must not reach the tensor before it, which others may
    take, or hooks hold."""

    def forward(self, input: Tensor) -> Tensor:
        """A tensor of its own."""
        return input.clone()


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
    in_place: frozenset[str]
    """Activations that write over the output of a norm that is taken out."""
    copied: frozenset[str]
    """Norms whose output a function writes over (`out += identity`): what takes their place copies."""
    warm_start: bool
    form: Form
    progress: Progress | None

    def named(self, action: str) -> list[str]:
        """The layers and norms with which this happens."""
        return [step.name for step in self.steps if step.action == action]

    def __str__(self) -> str:
        """A table, then the totals."""
        rows = [("layer", "class", "what", "why"), *((s.name, s.kind, s.action, s.reason) for s in self.steps)]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows]
        counts = ", ".join(f"{action} {len(names)}" for action in ACTIONS if (names := self.named(action)))
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

        Each layer to standardize keeps its class and gets a mark, and its weight becomes the kernel of alpha 1; an optimizer
        of `pws.optim` keeps it standardized. With `form="layers"` the layers become pws layers of the same kernels.

        With a warm start, kernels and biases are fitted to what the model computes; once, so that later changes of the
        model do not count (printing the plan needs the fit too). Else, with `calibrate`, the kernels are scaled on the
        example, in the order of execution, so that each standardized layer's output has variance 1, and those of all residual
        branches together as much: what the norms saw to. (`pws.calibrate` does it again on better data.) Without `calibrate`
        neither is done: the model is to be loaded from a checkpoint.

        Raises:
            PwsError: a layer's output does not vary on the example.
        """
        result = deepcopy(self._fitted) if self.warm_start and calibrate else self._converted()
        if calibrate and not self.warm_start and self.named("standardize"):
            names = {m: n for n, m in result.named_modules() if is_standardized(m)}
            setting = Setting(names, 1.0, False, None, branch_ends(result, self.example))
            setting.run(result, lambda: self.run_example(result))
        if self.form == "layers":
            to_layers(result)
        return result

    @cached_property
    def output_error(self) -> float | None:
        """With a warm start: root mean square of the outputs' difference on the example, in units of the outputs' deviation.
        Of few images it says too little: the fit knows them."""
        if not self.warm_start:
            return None
        return output_error(self.model, self._fitted, self.run_example)

    @cached_property
    def _fitted(self) -> nn.Module:
        """A marked copy whose layers give what layer and norm gave, as nearly as filters of mean zero can on the example."""
        result = self._converted()
        for norm, layer in self.pairs.items():
            if layer in self.named("absorb"):
                absorb(result.get_submodule(layer), self.model.get_submodule(norm))
        norms = {layer: self.model.get_submodule(norm) for norm, layer in self.pairs.items()}
        affines = {name: affine_of(norms[name]) if name in norms else None for name in self.named("standardize")}
        match(self.model, result, affines, self.run_example, self.progress)
        return result

    def run_example(self, model: nn.Module) -> Any:
        """The outputs of a model on the example."""
        return batch_of((self.example,)).outputs(model)

    def _converted(self) -> nn.Module:
        result = copy_of(self.model)
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
        for module in rest:
            if hasattr(module, "inplace"):
                module.inplace = False  # type: ignore[assignment]
        affine = affine_layer(norm, self.dims[name] - 2) if self.warm_start and name not in self.pairs else None
        rest = [affine, *rest] if affine is not None else rest
        rest = [*rest, Copy()] if not rest and name in self.copied else rest
        return nn.Sequential(*rest) if len(rest) > 1 else next(iter(rest), nn.Identity())
