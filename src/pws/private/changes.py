"""What makes a model acceptable to Opacus beside taking out its norms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from opacus.utils.module_utils import has_trainable_params
from opacus.validators import ModuleValidator
from torch import nn

from pws._batch import Forward
from pws.private.refused_norms import has_free_statistics
from pws.private.running import run_on
from pws.surgery.running import evaluated, input_of, removed_after


@dataclass
class Changes:
    """The names of what was changed."""

    measured: list[str] = field(default_factory=list)
    """Norms that got running statistics."""
    out_of_place: list[str] = field(default_factory=list)
    """Modules that no longer write over their input."""
    replaced: list[str] = field(default_factory=list)
    """Modules that became Opacus' own."""

    def lines(self) -> list[str]:
        """A line per kind."""
        told = {
            "running statistics taken from the images, for want of their own": self.measured,
            "no longer in place": self.out_of_place,
            "now Opacus' own layer, with the same weights": self.replaced,
        }
        return [f"{what}: {_listed(names)}" for what, names in told.items() if names]


def _listed(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@torch.no_grad()
def measure_statistics(model: nn.Module, images: Any, forward: Forward | None) -> list[str]:
    """Give each BatchNorm without running statistics those of its input at its first call; returns the names."""
    norms = {module: name for name, module in model.named_modules() if has_free_statistics(module)}

    def measure(norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = input_of(args, kwargs)
        if given is not None and norm.running_mean is None:
            dims = [dim for dim in range(given.dim()) if dim != 1]
            norm.track_running_stats = True
            norm.running_mean, norm.running_var = given.mean(dims), given.var(dims, correction=0)

    handles = [norm.register_forward_pre_hook(measure, with_kwargs=True) for norm in norms]
    with evaluated(model), removed_after(handles):
        run_on(model, images, forward)
    return [name for norm, name in norms.items() if norm.running_mean is not None]


def put_out_of_place(model: nn.Module) -> None:
    """Let no module write over its input."""
    for name in in_place(model):
        model.get_submodule(name).inplace = False  # type: ignore[assignment]


def in_place(model: nn.Module) -> list[str]:
    """The modules that write over their input."""
    return [name for name, module in model.named_modules() if getattr(module, "inplace", False) is True]


def replace_recurrent(model: nn.Module) -> list[str]:
    """Put Opacus' own layers, with the same weights, in the place of trained LSTMs and GRUs; returns the names."""
    old = {m: name for name, m in model.named_modules() if type(m) in (nn.LSTM, nn.GRU) and _fits(m)}
    new = {module: _opacus_layer(module) for module in old}
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child in new:
                parent._modules[key] = new[child]
    return list(old.values())


def _fits(module: Any) -> bool:
    return has_trainable_params(module) and not module.proj_size


def _opacus_layer(module: nn.Module) -> nn.Module:
    like = next(module.parameters())
    layer: nn.Module = ModuleValidator.FIXERS[type(module)](module)
    return layer.to(like.device, like.dtype)
