"""A compared method in a model of anybody's that has BatchNorm: in place of it, or beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pws._batch import example_of
from pws._errors import PwsError, UnknownNameError
from pws._gain import PAPER_GAIN, variance_preserving_gain
from pws._mark import unmark
from pws.methods.method import kaiming
from pws.methods.outputs import group_norm, one_group
from pws.methods.timm_layers import timm_layer
from pws.methods.weights import Scale
from pws.surgery import Plan, plan
from pws.surgery.branches import branch_ends
from pws.surgery.copying import copy_of
from pws.surgery.norms import held_by

NORMS: Final = ("batch", "group")
"""Families that methods without norms take out: a dense detector's head has Group Norm."""


def apply_method(model: nn.Module, method: str, example: Any, **options: Any) -> nn.Module:
    """A copy of `model` with `method`; the model is left alone.

    | method | what happens |
    | --- | --- |
    | bn | nothing |
    | frozen-bn | each BatchNorm's statistics and affine parameters become constants |
    | gn | each BatchNorm becomes a Group Norm |
    | ws | the same, and the convolutions right before it standardize their weights |
    | none | norms are taken out; the layers beside them get Kaiming's weights and a bias of 0 |
    | nf | the same with scaled weight standardization, and residual branches that start at 0 |
    | pws-paper | `pws.plan` with the paper's gain, fresh weights, and one norm behind the first layer |
    | pws | `pws.convert` |

    Args:
        model: any module with BatchNorm.
        method: one of the table's.
        example: what the model's forward takes, as for `pws.plan`.
        options: gamma and relative_gamma, of pws and pws-paper.

    Raises:
        UnknownNameError: none of these methods.
        PwsError: an option of another method, or a model that `pws.plan` refuses.
    """
    if method not in APPLIED:
        raise UnknownNameError("method for a model of others", method, APPLIED)
    if options and not method.startswith("pws"):
        raise PwsError(
            f"the method {method} has no options in a model of others; got {', '.join(options)}. Leave them out."
        )
    return APPLIED[method](model, example, **options)


def _as_it_is(model: nn.Module, _: Any) -> nn.Module:
    return copy_of(model)


def _frozen(model: nn.Module, _: Any) -> nn.Module:
    from torchvision.ops.misc import FrozenBatchNorm2d

    def freeze(norm: Any) -> nn.Module:
        if not isinstance(norm, nn.BatchNorm2d):
            raise PwsError(
                f"frozen-bn is for images: torchvision's FrozenBatchNorm2d; got a {type(norm).__name__}. Use another method."
            )
        frozen: nn.Module = FrozenBatchNorm2d(norm.num_features, eps=norm.eps)
        frozen.load_state_dict({name: value for name, value in _whole(norm).items() if name in frozen.state_dict()})
        return frozen

    return _replaced(copy_of(model), freeze)


def _whole(norm: Any) -> dict[str, Tensor]:
    """The state of a BatchNorm, 1 and 0 for affine parameters that it does not have."""
    fresh = nn.BatchNorm2d(norm.num_features)
    return {**fresh.state_dict(), **norm.state_dict()}


def _group_norms(model: nn.Module, _: Any) -> nn.Module:
    return _replaced(copy_of(model), lambda norm: group_norm(norm.num_features))


def _standardized_convolutions(model: nn.Module, example: Any) -> nn.Module:
    steps = plan(model, example)
    std_conv = timm_layer("ws", "std_conv", "StdConv2d")
    result = _group_norms(model, example)
    _rebuild(result, set(steps.pairs.values()), std_conv)
    return result


def _without_norms(model: nn.Module, example: Any) -> nn.Module:
    return _bare(plan(model, example, norms=NORMS))


def _bare(steps: Plan) -> nn.Module:
    """Without norms and marks; the layers that had a norm beside them have fresh weights."""
    result: nn.Module = steps.apply(calibrate=False)
    unmark(result)
    _draw(result, steps.named("standardize"))
    return result


def _normalizer_free(model: nn.Module, example: Any) -> nn.Module:
    steps = plan(model, example, norms=NORMS)
    ends = branch_ends(model, example_of(model, example), steps.named("standardize"))
    result = _bare(steps)
    std_conv, gain = timm_layer("nf", "std_conv", "ScaledStdConv2d"), variance_preserving_gain("relu")
    _rebuild(result, set(steps.named("standardize")), partial(std_conv, gamma=gain))
    for name in ends:
        result.set_submodule(name, nn.Sequential(result.get_submodule(name), Scale()))
    return result


def _published(model: nn.Module, example: Any, **options: Any) -> nn.Module:
    """Fresh kernels of the paper's gain; a one-group norm behind the first layer."""
    first = next(iter(plan(model, example, norms=NORMS).pairs.items()), None)
    source, chosen = copy_of(model), []
    if first is not None:
        norm, layer = first
        source.set_submodule(norm, one_group(source.get_submodule(norm).num_features))  # type: ignore[arg-type]
        chosen = [layer]
    steps = plan(source, example, norms=NORMS, standardize=chosen, **options)
    _draw(source, steps.named("standardize"))
    steps.gains.update(dict.fromkeys(steps.gains, PAPER_GAIN))
    return steps.apply(source, calibrate=False)


def _ours(model: nn.Module, example: Any, **options: Any) -> nn.Module:
    return plan(model, example, norms=NORMS, **options).apply()


APPLIED: Final[dict[str, Callable[..., nn.Module]]] = {
    "none": _without_norms,
    "bn": _as_it_is,
    "frozen-bn": _frozen,
    "gn": _group_norms,
    "ws": _standardized_convolutions,
    "nf": _normalizer_free,
    "pws-paper": _published,
    "pws": _ours,
}
"""Name to `(model, example, **options)` to a changed copy."""


def _replaced(model: nn.Module, norm: Callable[[Any], nn.Module]) -> nn.Module:
    """Put `norm(old)` in the place of each BatchNorm, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, _BatchNorm):
            new = norm(module).to(module.running_mean if module.weight is None else module.weight)
            held = held_by(module)  # timm's norms hold an activation
            model.set_submodule(name, (nn.Sequential(new, *held) if held else new).train(module.training))
    return model


@torch.no_grad()
def _draw(model: nn.Module, layers: Iterable[str]) -> None:
    for name in layers:
        kaiming(model.get_submodule(name))


@torch.no_grad()
def _rebuild(model: nn.Module, layers: set[str], build: Callable[..., nn.Module]) -> None:
    """Put convolutions of another class in the place of these, with their weights; those of one-entry filters stay."""
    for name in layers:
        conv: Any = model.get_submodule(name)
        if not isinstance(conv, nn.Conv2d) or conv.weight[0].numel() < 2:
            continue
        settings = {key: getattr(conv, key) for key in ("stride", "padding", "dilation", "groups")}
        new = build(conv.in_channels, conv.out_channels, conv.kernel_size, **settings, bias=conv.bias is not None)
        new.load_state_dict(conv.state_dict(), strict=False)
        model.set_submodule(name, new.to(conv.weight))
