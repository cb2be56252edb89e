"""The first layer whose output holds NaN or infinity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pws._batch import example_of, tensors_in
from pws._preserve import random_state


@torch.no_grad()
def first_non_finite(model: nn.Module, batch: Any, rewind: Callable[[], None] | None = None) -> str | None:
    """The name of the first layer, in execution order, whose output for a batch holds NaN or infinity, or None.

    The model runs once more in its present mode; BatchNorm's running statistics move by that one batch. `rewind` gives the
    random generators back what they were before the pass that failed; they go on as they are now.
    """
    go_on = random_state(model)
    found: list[str] = []
    # Inner layers fire before those that hold them; what a parametrization computes is the weight, not the output.
    layers = [(name, module) for name, module in model.named_modules() if ".parametrizations" not in name]

    def check(name: str) -> object:
        def hook(_: nn.Module, __: object, output: object) -> None:
            if not found and not all(bool(torch.isfinite(tensor).all()) for tensor in tensors_in(output)):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(check(name)) for name, module in layers]
    try:
        if rewind is not None:
            rewind()
        with torch.compiler.set_stance("force_eager"):  # compiled, layers would not be seen one by one
            example_of(model, batch).outputs(model)
    finally:
        go_on()
        for handle in handles:
            handle.remove()
    return found[0] if found else None
