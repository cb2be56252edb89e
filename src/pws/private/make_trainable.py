"""A model with BatchNorm, made one that Opacus trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from pws._batch import Forward
from pws.private import affine_sampler as affine_sampler
from pws.private.acceptance import check_accepted, keep_outputs
from pws.private.changes import Changes, in_place, measure_statistics, put_out_of_place, replace_recurrent
from pws.private.refused_norms import has_free_statistics, is_refused_norm
from pws.surgery import Plan, Step, plan
from pws.surgery._plan import Form
from pws.surgery.copying import copy_of
from pws.surgery.norms import channels_of, has_own_forward, is_trained
from pws.surgery.warm_start import Progress


def make_trainable(
    model: nn.Module,
    images: Any,
    *,
    form: Form = "layers",
    progress: Progress | None = None,
    forward: Forward | None = None,
    report: Callable[[str], object] = print,
) -> nn.Module:
    """Make a copy of a pretrained model that Opacus trains, and that computes nearly what the model does.

    It takes the place of `opacus.validators.ModuleValidator.fix`. BatchNorm of all kinds is taken out by a warm start
    (`pws.plan`), and so is InstanceNorm with running statistics. Where no layer can take a norm over, its scale and shift stay.

    - Norms of a model that was never trained hold nothing to keep: its layers are scaled on the images instead.
    - A BatchNorm without running statistics gets those of the images first.
    - Activations and dropout that write over their input no longer do: Opacus' hooks forbid it.
    - LSTM and GRU become Opacus' own layers with the same weights.

    The images must be public: what is set from them is no part of the privacy that Opacus accounts for. They need no labels,
    and may be of another data set, scaled to the mean and deviation of yours. Noise is a poor substitute: filters that are
    fitted to it lose much of the accuracy on images, though the report, which states the error on what was given, looks good.

    The copy trains in Opacus' modes hooks, functorch and ghost, and in ew where no norm's scale and shift stay.

    Args:
        model: any module. It is left alone.
        images: some hundred images as the model takes them, or whatever its forward takes, as in `pws.plan`.
        form: "layers" for any optimizer, with `bound_steps`; "optimizer" for one of `pws.optim`, as in `pws.plan`. The layers
            take the average gradient out before an image's gradient is clipped, and train better in private.
        progress: called with the number of layers fitted and of all.
        forward: runs the model, `forward(model, images)`, where the images have another form.
        report: called once with the text that says what was done to each layer and norm, and the error that is left.

    Returns:
        The copy in train mode, as Opacus wants it.

    Raises:
        PwsError: the model can't be run on the images, or holds what Opacus can't train: a norm that can't be taken out,
            buffers beside trained parameters, a computed weight, nn.MultiheadAttention, nn.RNN, or a function that writes over
            a layer's output. The message names the module and what to do.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        >>> private = make_trainable(model, torch.randn(4, 3, 8, 8), report=lambda text: None)
        >>> private
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), gamma=0.001, gain=1)
          (1): Identity()
          (2): ReLU()
        )
    """
    changes = Changes(out_of_place=in_place(model))
    if any(map(has_free_statistics, model.modules())):
        model = copy_of(model)
        changes.measured = measure_statistics(model, images, forward)
    planned = _plan(model, images, form, progress, forward)
    result = copy_of(model) if planned is None else planned.apply()
    put_out_of_place(result)
    changes.replaced = replace_recurrent(result)
    reasons = {} if planned is None else {step.name: step.reason for step in planned.steps}
    check_accepted(result, reasons)
    keep_outputs(result, images, forward)
    report(_told(planned, changes))
    return result.train()


def _plan(model: nn.Module, images: Any, form: Form, progress: Progress | None, forward: Forward | None) -> Plan | None:
    """The plan; None if the model has none of the norms that Opacus rejects."""
    refused = [module for module in model.modules() if is_refused_norm(module)]
    if not refused:
        return None
    planned = plan(
        model,
        images,
        norms=("batch", "instance"),
        keep=lambda _, module: isinstance(module, _InstanceNorm) and not is_refused_norm(module),
        warm_start=any(map(is_trained, refused)),
        form=form,
        progress=progress,
        forward=forward,
    )
    return _with_affines(planned, dict(model.named_modules()))


def _with_affines(planned: Plan, modules: dict[str, nn.Module]) -> Plan:
    """The plan, with a scale and shift in place of each norm that it would keep: private training bears none of them."""

    def bears(step: Step) -> bool:
        module = modules[step.name]
        return step.action != "keep" or not is_refused_norm(module) or has_own_forward(module)

    def changed(step: Step) -> Step:
        reason, channels = f"{step.reason}; its scale and shift stay", channels_of(modules[step.name])
        return replace(step, action="affine", reason=reason, parameters_after=2 * channels)

    steps = tuple(step if bears(step) else changed(step) for step in planned.steps)
    constant = {
        n.name for n, old in zip(steps, planned.steps, strict=True) if n != old and not _trains(modules[n.name])
    }
    return replace(planned, steps=steps, fixed=planned.fixed | constant)


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _told(planned: Plan | None, changes: Changes) -> str:
    if planned is None:
        lines = ["no norm was taken out: Opacus takes all that the model has"]
    elif planned.warm_start:
        lines = [str(planned)]
    else:
        lines = [str(planned), "no warm start: the norms hold no statistics of any training"]
    return "\n".join([*lines, *changes.lines()])
