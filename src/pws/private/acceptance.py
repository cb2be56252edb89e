"""What Opacus rejects, found before it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from opacus.grad_sample import GradSampleHooks
from opacus.utils.module_utils import has_trainable_params
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from pws._batch import Forward, tensors_in
from pws._errors import PwsError, one_line
from pws.private.refused_norms import is_refused_norm
from pws.private.running import run_on
from pws.surgery.running import branches_run, hooked
from pws.surgery.stand_ins import Affine, Copy

RULE: Final = "private training needs the gradient of each sample by itself"

_LAYERS: Final[dict[type[nn.Module], str]] = {
    nn.MultiheadAttention: (
        "computes that in a function of its own; Opacus' replacement gives other outputs (batch_first) or needs the samples "
        "along the second dimension. Write attention with nn.Linear and torch's scaled_dot_product_attention, as timm does."
    ),
    nn.RNNBase: (
        "computes that in a function of its own. LSTM and GRU are replaced by Opacus' layers, not subclasses of them, nor "
        "projections (proj_size), nor RNN: take opacus.layers.DPRNN, or freeze its parameters (requires_grad_(False))."
    ),
}
"""Layers that Opacus can't follow, to what is wrong with them and what to do."""


def check_accepted(model: nn.Module, reasons: Mapping[str, str]) -> None:
    """Raise `PwsError` for the first module that Opacus rejects. `reasons` tells why a norm was left in its place."""
    for name, module in model.named_modules():
        if problem := _problem(module, reasons.get(name, "")):
            raise _error(name, module, problem)


def _error(name: str, module: nn.Module, problem: str) -> PwsError:
    return PwsError(f"{RULE}; {repr(name) if name else 'the model itself'}, a {type(module).__name__}, {problem}")


def _problem(module: nn.Module, reason: str) -> str:
    """What is wrong, and what to do; "" if nothing is."""
    if is_refused_norm(module):
        return (
            f"makes it depend on other samples, and can't be taken out: {reason}. Put nn.GroupNorm or nn.Identity in its "
            "place, or torch's own BatchNorm, which can be taken out."
        )
    if _computes_weight(module):
        return (
            "computes its weight from other parameters, which Opacus can't follow. Make the weight permanent first: "
            "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight'), torch.nn.utils.remove_weight_norm(module), "
            "torch.nn.utils.prune.remove(module, 'weight')."
        )
    if not has_trainable_params(module):
        return ""
    for kind, problem in _LAYERS.items():
        if isinstance(module, kind):
            return problem
    buffers = [name for name, _ in module.named_buffers()]
    if buffers:
        return (
            f"has trained parameters beside the buffers {', '.join(buffers)}: training could write into these what it saw, so "
            "Opacus refuses them. Freeze its parameters (requires_grad_(False)). Or, if the buffers are constant, make them "
            "plain attributes: module.index = module._buffers.pop('index')."
        )
    errors = ModuleValidator.VALIDATORS.get(type(module), lambda _: [])(module)
    return f"is refused by Opacus: {one_line(errors[0])}" if errors else ""


def _computes_weight(module: nn.Module) -> bool:
    """Whether a trained layer's weight is no parameter: a parametrization, or a hook as that of the old weight norm."""
    if is_parametrized(module):
        return any(parameter.requires_grad for parameter in module.parameters())
    is_hooked = type(module) in GradSampleHooks.GRAD_SAMPLERS and "weight" not in module._parameters
    return is_hooked and has_trainable_params(module) and isinstance(getattr(module, "weight", None), Tensor)


def keep_outputs(model: nn.Module, images: Any, forward: Forward | None) -> None:
    """See that nothing writes over the output of a module with trained parameters, where Opacus' hook sits.

    What stands in the place of a norm gives a copy then.

    Raises:
        PwsError: a function of the model's forward, such as `x += y`, writes over the output of a layer.
    """
    for name in _written(model, images, forward):
        module = model.get_submodule(name)
        if not isinstance(module, Affine):
            raise _error(
                name,
                module,
                "gives an output that a function of the model's forward writes over, and Opacus' hook there forbids it. Write "
                "it out of place: x = x + y for x += y, relu(x) for relu_(x) or relu(x, inplace=True).",
            )
        model.set_submodule(name, nn.Sequential(module, Copy()))


@torch.no_grad()
def _written(model: nn.Module, images: Any, forward: Forward | None) -> list[str]:
    modules = {module: name for name, module in _watched(model)}
    given: list[tuple[str, Tensor, int]] = []

    def note(module: nn.Module, _: object, __: object, output: Any) -> None:
        given.extend((modules[module], tensor, tensor._version) for tensor in tensors_in(output))

    with branches_run(model), hooked(list(modules), note):
        run_on(model, images, forward)
    return list(dict.fromkeys(name for name, tensor, version in given if tensor._version != version))


def _watched(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules that get a hook from Opacus: those with parameters of their own, but not what is inside of one that it runs
    as a whole."""
    if has_trainable_params(model):
        yield name, model
        if type(model) not in GradSampleHooks.GRAD_SAMPLERS:
            return
    for key, child in model.named_children():
        yield from _watched(child, f"{name}.{key}" if name else key)
