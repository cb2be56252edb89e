"""The first layer whose output holds NaN or infinity."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pws._preserve import random_state


@torch.no_grad()
def first_non_finite(model: nn.Module, images: Tensor, rewind: Callable[[], None] | None = None) -> str | None:
    """The name of the first layer, in execution order, whose output for `images` holds NaN or infinity, or None.

    The model runs once more in its present mode; BatchNorm's running statistics move by that one batch. `rewind` gives the
    random generators back what they were before the pass that failed; they go on as they are now.
    """
    go_on = random_state(model)
    found: list[str] = []
    # Inner layers fire before those that hold them; what a parametrization computes is the weight, not the output.
    layers = [(name, module) for name, module in model.named_modules() if ".parametrizations" not in name]

    def check(name: str) -> object:
        def hook(_: nn.Module, __: object, output: object) -> None:
            if not found and isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(name)

        return hook

    handles = [module.register_forward_hook(check(name)) for name, module in layers]
    try:
        if rewind is not None:
            rewind()
        model(images)
    finally:
        go_on()
        for handle in handles:
            handle.remove()
    return found[0] if found else None
