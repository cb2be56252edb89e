"""A converted model that computes nearly what the trained one did.

In eval mode a BatchNorm is a scale and a shift a channel. Right behind a layer they go into its weight and bias;
elsewhere they stay, as a depthwise 1x1 convolution. Centring a filter `w` loses `m sum(x)`, the patch's sum times the filter's
mean `m`. So each layer gets the zero-mean filters that come nearest to what the trained layer gave on the example
(`pws.surgery.nearest`), in the order of execution: each makes up for what those before it changed in its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pws._autocast import fresh_casts
from pws._errors import PwsError
from pws.surgery.nearest import nearest_filters
from pws.surgery.norms import Affine, affine_of
from pws.surgery.running import branches_run, evaluated, hooked, input_of
from pws.surgery.standardized import own_filters, set_filters

Forward = Callable[[nn.Module], Any]
Progress = Callable[[int, int], None]


@dataclass
class Match:
    """Fits weight and bias of the marked layers of `converted`, each by its first call."""

    original: nn.Module
    """The trained model."""
    converted: nn.Module
    """Its copy, with marked layers."""
    targets: Mapping[str, Affine | None]
    """Name of each layer to fit, to the scale and shift that its output in `original` went through."""
    selected: Collection[str]
    """Layers whose inputs the numbers select (a detector's regions): both models' do not correspond, so these are fitted on the
    original's."""
    progress: Progress | None
    """Called with the number of layers fitted and of all."""
    fitted: set[str] = field(default_factory=set)

    @fresh_casts()
    @torch.no_grad()
    def run(self, forward: Forward) -> None:
        """`forward` runs a model on the example: in eval mode, then in train mode for what runs in that alone."""
        for mode in (evaluated, branches_run):
            if len(self.fitted) < len(self.targets):
                self._pass(forward, mode)

    def _pass(self, forward: Forward, mode: Callable[[nn.Module], AbstractContextManager[None]]) -> None:
        wanted: dict[str, Tensor] = {}
        left = [name for name in self.targets if name not in self.fitted]
        originals = {self.original.get_submodule(name): name for name in left}
        layers = {self.converted.get_submodule(name): name for name in left}

        def record(module: nn.Module, _: object, __: object, output: Tensor) -> None:
            wanted.setdefault(originals[module], self._target(originals[module], module, output))

        def fit(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            name = layers[module]
            corresponds = name in wanted and wanted[name].shape == _channel_last(module, output).shape
            if name in self.fitted or name in self.selected or not corresponds:
                return output
            return self._fit(name, args, kwargs, wanted.pop(name))

        def fit_apart(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if originals[module] not in self.fitted:
                self._fit(originals[module], args, kwargs, self._target(originals[module], module, output))

        with mode(self.original), hooked(list(originals), record):
            forward(self.original)
        with mode(self.converted), hooked(list(layers), fit):
            forward(self.converted)
        if any(name in wanted for name in left if name not in self.fitted):
            with mode(self.original), hooked(list(originals), fit_apart):
                forward(self.original)

    def _target(self, name: str, module: nn.Module, output: Tensor) -> Tensor:
        affine, channel_last = self.targets[name], _channel_last(module, output).detach()
        # A copy in any case: an activation in place may follow.
        return channel_last.clone() if affine is None else channel_last * affine[0] + affine[1]

    def _fit(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: Tensor) -> Tensor:
        self.fitted.add(name)
        layer, trained = self.converted.get_submodule(name), self.original.get_submodule(name)
        affine, trained_OK = self.targets[name], own_filters(trained).detach().flatten(1)
        trained_OK = trained_OK if affine is None else trained_OK * affine[0][:, None]
        inputs = input_of(args, kwargs)
        assert inputs is not None
        _check_finite(name, inputs, wanted)

        def call(module: nn.Module, some: Tensor) -> Tensor:
            # Transposed convolutions are given an output_size too.
            named = {key: some if value is inputs else value for key, value in kwargs.items()}
            result: Tensor = module.forward(*(some if value is inputs else value for value in args), **named)
            return result

        # New parameters: a model that differentiates inside its forward still needs the old ones.
        for key, parameter in layer._parameters.items():
            if parameter is not None:
                layer._parameters[key] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        nearest_filters(layer, inputs, wanted, trained_OK, call)
        if self.progress is not None:
            self.progress(len(self.fitted), len(self.targets))
        return call(layer, inputs)


def _channel_last(layer: nn.Module, output: Tensor) -> Tensor:
    weight: Any = layer.weight
    return output.movedim(1 - weight.dim(), -1)


def _check_finite(name: str, *tensors: Tensor) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise PwsError(
            f"a warm start keeps what a trained model computes, which must be finite; at layer {name!r} it is not, on the "
            "example. The checkpoint's weights or a norm's running statistics hold NaN or infinity: look for them there."
        )


@torch.no_grad()
def absorb(layer: nn.Module, norm: nn.Module) -> None:
    """Scale and shift of a norm, into weight and bias of the plain layer before it."""
    affine = affine_of(norm)
    assert affine is not None
    filters, bias = own_filters(layer), layer._parameters["bias"]
    assert bias is not None
    set_filters(layer, filters * affine[0].view(-1, *[1] * (filters.dim() - 1)))
    bias.copy_(bias * affine[0] + affine[1])


@fresh_casts()
@torch.no_grad()
def output_error(original: nn.Module, converted: nn.Module, names: Collection[str], forward: Forward) -> float:
    """Root mean square of the difference of what modules give at their first call, in units of the original's deviation; the
    mean over the modules. NaN if none of them ran."""
    errors: list[float] = []
    for mode in (evaluated, branches_run):
        with mode(original):
            wanted = _first_outputs(original, names, forward)
        with mode(converted):
            found = _first_outputs(converted, names, forward)
        errors += [_error(found[name], wanted[name]) for name in wanted]
        names = [name for name in names if name not in wanted]
        if not names:
            break
    return sum(errors) / len(errors) if errors else float("nan")


def _first_outputs(model: nn.Module, names: Collection[str], forward: Forward) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    modules = {model.get_submodule(name): name for name in names}

    def keep(module: nn.Module, _: object, __: object, output: Tensor) -> None:
        found.setdefault(modules[module], output.detach().double().clone())

    with hooked(list(modules), keep):
        forward(model)
    return found


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().mean().sqrt() / wanted.std())
