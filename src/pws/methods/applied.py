"""A compared method in a model of anybody's that has BatchNorm: in place of it, or beside it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import MappingProxyType
from typing import Any, Final

from torch import nn

from pws._batch import example_of
from pws._errors import PwsError, UnknownNameError
from pws._gain import PAPER_GAIN, variance_preserving_gain
from pws._mark import mark, unmark
from pws.methods.outputs import group_norm, one_group
from pws.methods.registry import check_options
from pws.methods.replaced import convolution_of_timm, draw, frozen_norm, in_place_of, replace
from pws.methods.weights import Scale
from pws.surgery import Plan, plan
from pws.surgery._plan import Form
from pws.surgery.branches import branch_ends
from pws.surgery.copying import copy_of
from pws.surgery.norms import NORMS, channels_of, is_frozen
from pws.surgery.trace import trace
from pws.surgery.value import Trace

FAMILIES: Final = ("batch", "group")
"""Norms that methods without norms take out: a dense detector's head has Group Norm."""


def apply_method(model: nn.Module, method: str, example: Any, **options: Any) -> nn.Module:
    """A copy of `model` with `method`; the model is left alone.

    | method | what happens |
    | --- | --- |
    | bn | nothing |
    | frozen-bn | each BatchNorm's statistics and affine parameters become constants |
    | gn | each BatchNorm becomes a Group Norm |
    | ws | the same, and each convolution whose output is normalized standardizes its weight |
    | none | norms are taken out; the layers beside them get Kaiming's weights and a bias of 0 |
    | nf | the same with scaled weight standardization, and residual branches that start at 0 |
    | pws-paper | `pws.plan` with the paper's gain, fresh weights, and a one-group norm in the place of the first norm |
    | pws | `pws.plan`, calibrated on the example |

    bn, frozen-bn, gn and ws keep the weights. What ends a residual branch in nf goes into a Sequential with its scale, and so
    does a norm that holds an activation; all other names in the state dict stay.

    Args:
        model: any module with BatchNorm.
        method: one of the table's.
        example: what the model's forward takes, as for `pws.plan`.
        options: gamma, of pws and pws-paper; relative_gamma, standardize (layers without a norm) and form, of pws.

    Raises:
        UnknownNameError: none of these methods.
        PwsError: an option of another method, or a model in which the method is not possible.
    """
    if method not in APPLIED:
        raise UnknownNameError("method for a model of others", method, APPLIED)
    check_options(method, APPLIED[method], options)
    return APPLIED[method](model, example, **options)


def _as_it_is(model: nn.Module, _: Any) -> nn.Module:
    return copy_of(model)


def _frozen(model: nn.Module, _: Any) -> nn.Module:
    result = copy_of(model)
    norms = [norm for norm in _norms(result, "batch").values() if not is_frozen(norm)]
    return replace(result, {norm: frozen_norm(norm) for norm in norms})


def _group_norms(model: nn.Module, example: Any) -> nn.Module:
    return _normalized(copy_of(model), _run(model, example))


def _standardized(model: nn.Module, example: Any) -> nn.Module:
    run, result = _run(model, example), copy_of(model)
    norms = _norms(result, *FAMILIES).keys() - _frozen_with_layers(run)
    before = [name for name, takers in run.takers.items() if takers and takers <= norms]
    return _normalized(_of_timm("ws", result, before, "Std"), run)


def _without_norms(model: nn.Module, example: Any) -> nn.Module:
    return _bare(_plan(model, example))


def _normalizer_free(model: nn.Module, example: Any) -> nn.Module:
    planned = _plan(model, example)
    result, layers = _bare(planned), planned.named("standardize")
    ends = branch_ends(result, example_of(result, example), layers)
    result = _of_timm("nf", result, layers, "ScaledStd", gamma=variance_preserving_gain("relu"))
    modules = dict(result.named_modules())
    return replace(result, {modules[name]: _scaled(modules[name]) for name in ends})


def _scaled(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, Scale().to(next(layer.parameters()))).train(layer.training)


def _published(model: nn.Module, example: Any, *, gamma: float = 1e-3) -> nn.Module:
    planned = _plan(model, example, gamma=gamma)
    result = planned.apply(calibrate=False)
    for name in planned.named("standardize"):
        mark(result.get_submodule(name), gain=PAPER_GAIN, gamma=gamma, reset_parameters=True)
    modules = dict(_planned_model(planned).named_modules())
    first = next((step for step in planned.steps if _is_norm(modules[step.name]) and step.action != "affine"), None)
    if first is None or first.action == "keep":  # a frozen stem stays as it is
        return result
    norm = copy_of(modules[first.name])
    return replace(result, {result.get_submodule(first.name): in_place_of(norm, one_group(channels_of(norm)))})


def _ours(
    model: nn.Module,
    example: Any,
    *,
    gamma: float = 1e-3,
    relative_gamma: bool = False,
    standardize: Collection[str] = (),
    form: Form = "optimizer",
) -> nn.Module:
    planned = plan(
        *(model, example),
        norms=FAMILIES,
        gamma=gamma,
        relative_gamma=relative_gamma,
        standardize=standardize,
        form=form,
    )
    return planned.apply()


APPLIED: Final = MappingProxyType[str, Callable[..., nn.Module]](
    {
        "none": _without_norms,
        "bn": _as_it_is,
        "frozen-bn": _frozen,
        "gn": _group_norms,
        "ws": _standardized,
        "nf": _normalizer_free,
        "pws-paper": _published,
        "pws": _ours,
    }
)
"""Name to `(model, example, *, options)` to a changed copy."""


def _is_norm(module: nn.Module, families: tuple[str, ...] = FAMILIES) -> bool:
    return any(test(module) for family in families for test in NORMS[family])


def _norms(model: nn.Module, *families: str) -> dict[str, nn.Module]:
    found = {name: module for name, module in model.named_modules() if _is_norm(module, families)}
    if not found:
        raise PwsError(
            f"a method takes the place of BatchNorm, and {type(model).__name__} has none. Take a model with BatchNorm, or "
            "method bn, which leaves the model as it is."
        )
    return found


def _run(model: nn.Module, example: Any) -> Trace:
    return trace(model, example_of(model, example), _is_norm)


def _frozen_with_layers(run: Trace) -> set[str]:
    """The frozen norms whose layers are frozen too: they stay, as in `pws.plan`."""
    modules = dict(run.model.named_modules())
    trained = {
        name for name, module in modules.items() if any(p.requires_grad for p in module.parameters(recurse=False))
    }
    uses = [use for use in run.uses if use.is_norm and is_frozen(modules[use.name])]
    return {use.name for use in uses} - {use.name for use in uses if use.input.sources & trained}


def _normalized(model: nn.Module, run: Trace) -> nn.Module:
    """With Group Norm in the place of BatchNorm, in place."""
    stay = _frozen_with_layers(run)
    norms = [norm for name, norm in _norms(model, "batch").items() if name not in stay]
    return replace(model, {norm: in_place_of(norm, group_norm(channels_of(norm))) for norm in norms})


def _plan(model: nn.Module, example: Any, **options: Any) -> Plan:
    """The plan that takes every norm out.

    Raises:
        PwsError: one has to stay, and it is not frozen.
    """
    planned = plan(model, example, norms=FAMILIES, **options)
    modules = dict(_planned_model(planned).named_modules())
    for step in planned.steps:
        module = modules[step.name]
        if step.action == "keep" and _is_norm(module) and not is_frozen(module):
            raise PwsError(
                f"this method takes every norm out, and {step.name!r} has to stay: {step.reason}. Use bn, gn or ws; or pws, "
                "which leaves such a norm."
            )
    return planned


def _planned_model(planned: Plan) -> nn.Module:
    assert planned.model is not None
    return planned.model


def _bare(planned: Plan) -> nn.Module:
    """Without norms and marks; the layers that had a norm beside them have fresh weights."""
    result = planned.apply(calibrate=False)
    unmark(result)
    for name in planned.named("standardize"):
        draw(result.get_submodule(name))
    return result


def _of_timm(method: str, model: nn.Module, layers: list[str], prefix: str, **settings: Any) -> nn.Module:
    """With timm's convolutions in the place of plain ones, in place; those that timm has no such layer for stay."""
    modules = dict(model.named_modules())
    built = {modules[n]: convolution_of_timm(method, modules[n], prefix, **settings) for n in layers if n in modules}
    found = {layer: new for layer, new in built.items() if new is not None}
    if not found:
        raise PwsError(
            f"the method {method} is for 2-d convolutions beside a norm, with two entries or more in a filter; "
            f"{type(model).__name__} has none. Use gn, or pws."
        )
    return replace(model, found)
