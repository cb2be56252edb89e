"""Gradients that a `torch.amp.GradScaler` has yet to unscale: a bound on their step would leave next to nothing of it."""

from __future__ import annotations

import gc
import sys
import warnings
from typing import Final
from weakref import WeakSet

from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

_asked: Final[WeakSet[Optimizer]] = WeakSet()
_without_scaler: list[int] = []
"""The references to each kind of scaler when there was none. Objects refer to their class: as many mean that there is none."""


def notice_scaled_gradients(optimizer: Optimizer) -> None:
    """Warn if a scaler is in use that has unscaled no gradients since its last update. For a step that is cut; asked once per
    optimizer, and looked for where a scaler may have been made since: that takes a tenth of a second.

    Gradients do not tell that they are scaled, nor optimizers that a scaler serves them: so it is looked for.
    """
    if optimizer in _asked:
        return
    _asked.add(optimizer)
    kinds = _kinds()
    references = [sys.getrefcount(kind) for kind in kinds]
    if references == _without_scaler:
        return
    scalers = _scalers(kinds)
    _without_scaler[:] = [] if scalers else references
    for scaler in scalers:
        if not scaler.is_enabled() or scaler._scale is None:  # it has scaled no loss
            continue
        stages = [state["stage"] for state in scaler._per_optimizer_states.values()]
        if OptState.UNSCALED not in stages and scaler.get_scale() > 1:
            warnings.warn(
                f"the gradients seem to be multiplied by a GradScaler's scale of {scaler.get_scale():g}, and a bound on the "
                "step cuts them down to next to nothing. Call scaler.unscale_(optimizer) before pws.clip_grad, and "
                "scaler.step(optimizer) in place of optimizer.step(). If the scaler is another model's, ignore this.",
                RuntimeWarning,
                stacklevel=3,
            )
            return


def _kinds() -> list[type[GradScaler]]:
    kinds: list[type[GradScaler]] = [GradScaler]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    return kinds


def _scalers(kinds: list[type[GradScaler]]) -> list[GradScaler]:
    # An object refers to its class: so this is found in a fraction of the time that a look at all objects takes.
    return [item for item in gc.get_referrers(*kinds) if type(item) in kinds]
