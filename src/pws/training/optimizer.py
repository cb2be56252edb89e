"""The optimizer of a recipe: of `pws.optim` for a network with marked layers, torch's or timm's own for others."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from pws._errors import PwsError
from pws._mark import marked
from pws._param_groups import param_groups
from pws.methods import Method
from pws.optim import SGD, AdamW, Wrapped
from pws.optim.adamw import TAKEN_BOUND
from pws.optim.bound import bound_with
from pws.training.recipe import OptimConfig


def build_optimizer(model: nn.Module, optim: OptimConfig, bound: float | None) -> Optimizer:
    """The optimizer over `pws.param_groups`; if layers are marked, no layer's step is longer than `bound`.

    Raises:
        PwsError: muon or lamb without timm, or a model without anything to train.
    """
    groups = param_groups(model, lr=optim.lr, weight_decay=optim.weight_decay, scale_lr_factor=optim.scale_lr_factor)
    settings: dict[str, Any] = {} if optim.name in ("adamw", "lamb") else {"momentum": optim.momentum}
    if optim.nesterov:
        settings["nesterov"] = True
    if not marked(model):
        return _class_of(optim.name)(groups, **settings)
    if optim.name == "sgd":
        return SGD(groups, **settings, step_bound=bound)
    if optim.name == "adamw":
        return AdamW(groups, **settings, step_bound=bound)
    return Wrapped(groups, _class_of(optim.name), **settings, step_bound=bound)


def step_bound(optim: OptimConfig, method: Method | None, steps: int | None = None) -> float | None:
    """The recipe's bound on a layer's step; it gives way to a clipped norm.

    "method" is the method's own: for sgd by its momentum, which may start anew after `steps`, for others the bound on the step
    as it is taken.
    """
    if optim.step_bound != "method":
        return optim.step_bound
    if method is None or method.step_bound is None or optim.clip_norm is not None:
        return None
    return bound_with(optim.momentum, steps, method.step_bound) if optim.name == "sgd" else TAKEN_BOUND


def _class_of(name: str) -> type[Optimizer]:
    if name not in ("muon", "lamb"):
        return {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}[name]
    try:
        # torch's Muon takes matrices only; timm's convolutions too, and AdamW for the rest.
        from timm.optim.lamb import Lamb
        from timm.optim.muon import Muon
    except ImportError as error:
        raise PwsError(f"the optimizer {name} is timm's: pip install 'pws-torch[models]'.") from error
    found: type[Optimizer] = Muon if name == "muon" else Lamb
    return found
