"""`pws.plan` and `pws.convert`: a model of anybody's, without its norms."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from pws._batch import Forward, example_of
from pws._errors import PwsError, UnknownNameError
from pws._standardize import check_gamma
from pws.surgery._plan import FORMS, Form, Plan
from pws.surgery.norms import NORMS, is_trained
from pws.surgery.planner import Planner, Selector
from pws.surgery.trace import trace
from pws.surgery.warm_start import Progress


def plan(
    model: nn.Module,
    example: Any,
    *,
    norms: Collection[str] = ("batch",),
    keep: Selector | Collection[Selector] = (),
    standardize: Selector | Collection[Selector] = (),
    gamma: float = 1e-3,
    relative_gamma: bool = False,
    warm_start: bool = False,
    form: Form = "optimizer",
    progress: Progress | None = None,
    forward: Forward | None = None,
) -> Plan:
    """Plan how to remove the norms of `model`: run a copy of it once on `example`, and follow its tensors.

    A layer is standardized if its output goes into a norm that is removed. An activation, an addition or a concatenation may
    stand between them. A layer is standardized too if it takes such a norm's output (pre-activation networks).

    A layer without a norm behind it predicts, and stays plain. So does a gate, which only scales another tensor (squeeze and
    excitation). A norm of the input becomes a fixed scale and shift.

    A norm stays if `keep` names it, if it did not run, or if its forward is not torch's. It also stays if layers that can't be
    standardized made what it normalizes.

    Args:
        model: any module. It is left alone.
        example: what its forward takes: a tensor, or a tuple or dict of all arguments; or a batch as a DataLoader gives it. Any
            batch size.
        norms: families to remove: "batch" (BatchNorm of all dimensions, synchronized, frozen, with activation), "group",
            "layer" (of images), "instance".
        keep: layers and norms to leave alone: names or patterns (`layer4.*`), classes, or a predicate of name and module.
        standardize: layers to standardize though no norm stands beside them, such as the hidden layers of a detector's heads;
            given as `keep`, which wins.
        gamma: gamma of the standardized layers.
        relative_gamma: whether their gamma is relative to the fan-in.
        warm_start: keep what a trained model computes, as closely as filters of mean zero allow. Each layer is fitted to its
            outputs on the example, which should be some hundred real images. Layers on the input and depthwise layers stay
            plain and take over their norms, because centred filters would lose the mean of what they see. The plan states the
            error that is left once `fit` or `apply` was called. A short fine-tuning removes most of it.
        form: "optimizer" keeps the layers and marks them (`pws.mark`), for an optimizer of `pws.optim`. "layers" makes pws
            layers, which any optimizer trains.
        progress: called with the number of layers fitted and of all; the fit of a large model takes minutes.
        forward: runs the model, `forward(model, example)`, where the example has another form.

    Raises:
        PwsError: the model can't be run on the example, or has no norm of these families.
        UnknownNameError: no such family of norms, or no such form.
    """
    check_gamma(gamma)
    if form not in FORMS:
        raise UnknownNameError("form of conversion", form, FORMS)
    for family in norms:
        if family not in NORMS:
            raise UnknownNameError("family of norms", family, NORMS)
    tests = [test for family in norms for test in NORMS[family]]

    def is_norm(module: nn.Module) -> bool:
        return any(test(module) for test in tests)

    kept, chosen = _selectors(keep, model, "keep"), _selectors(standardize, model, "standardize")
    if not chosen and not any(map(is_norm, model.modules())):
        raise PwsError(
            f"{type(model).__name__} has no norm to take out: none of the families {', '.join(norms)}. "
            f"Others are chosen by norms=: {', '.join(NORMS)}. Layers without a norm are chosen by standardize=."
        )
    run = trace(model, example_of(model, example, forward), is_norm)
    made = Planner(model, run, is_norm, kept, chosen, warm_start=warm_start, form=form)
    planned = made.plan(gamma, relative_gamma, example, progress, forward)
    if not warm_start:
        _warn_of_trained(planned)
    return planned


def _selectors(given: Selector | Collection[Selector], model: nn.Module, purpose: str) -> list[Selector]:
    """What was given, as a list; raises `UnknownNameError` for a name or pattern that nothing has."""
    selectors = [given] if isinstance(given, str | type) or callable(given) else list(given)
    names = [name for name, _ in model.named_modules() if name]
    for rule in selectors:
        if isinstance(rule, str) and not any(fnmatchcase(name, rule) for name in names):
            raise UnknownNameError(f"layer or norm to {purpose}", rule, names)
    return selectors


def _warn_of_trained(planned: Plan) -> None:
    modules = dict(planned.model.named_modules()) if planned.model is not None else {}
    trained = [name for name in (*planned.named("remove"), *planned.named("affine")) if is_trained(modules[name])]
    if trained:
        warnings.warn(
            f"{len(trained)} norms that are taken out, such as {trained[0]!r}, hold statistics of some training, and the "
            "layers beside them are set anew: what the model computes is lost. To keep it, convert with warm_start=True on "
            "some hundred real images.",
            stacklevel=3,
        )


def convert(
    model: nn.Module,
    example: Any,
    *,
    calibrate: bool = True,
    norms: Collection[str] = ("batch",),
    keep: Selector | Collection[Selector] = (),
    standardize: Selector | Collection[Selector] = (),
    gamma: float = 1e-3,
    relative_gamma: bool = False,
    warm_start: bool = False,
    form: Form = "optimizer",
    progress: Progress | None = None,
    forward: Forward | None = None,
) -> nn.Module:
    """Make a copy of `model` that trains without its norms: `plan(model, example, ...).apply(calibrate=calibrate)`.

    Its layers are those of `model`, marked as standardized. Train it with an optimizer of `pws.optim`, which reads the marks.
    With another optimizer they train as plain layers without a norm. `form="layers"` makes pws layers instead.

    Args:
        model: any module. It is left alone.
        example: what its forward takes; a batch of real data, if the kernels are calibrated on it.
        calibrate: scale the kernels on the example, so that each layer keeps the variance that its norm gave it.
        norms: families of norms to remove, as in `pws.plan`.
        keep: layers and norms to leave alone, as in `pws.plan`.
        standardize: layers to standardize without a norm, as in `pws.plan`.
        gamma: gamma of the standardized layers.
        relative_gamma: whether their gamma is relative to the fan-in.
        warm_start: keep what a trained model computes, as in `pws.plan`.
        form: "optimizer" or "layers", as in `pws.plan`.
        progress: called with the number of layers fitted and of all.
        forward: runs the model, where the example has another form.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> converted = convert(model, torch.randn(2, 3, 8, 8))
        >>> converted
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
        >>> converted[0].pws
        Mark(gain=1.0, gamma=0.001, relative_gamma=False)
    """
    return plan(
        model,
        example,
        norms=norms,
        keep=keep,
        standardize=standardize,
        gamma=gamma,
        relative_gamma=relative_gamma,
        warm_start=warm_start,
        form=form,
        progress=progress,
        forward=forward,
    ).apply(calibrate=calibrate)
