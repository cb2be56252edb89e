"""All kernels of a model in one go before each forward pass: `standardize_together`."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Final

import torch
from torch import nn

from pws.errors import PwsError
from pws.kernels.backend import Job
from pws.kernels.together import forget, prepare
from pws.layers import StandardizedLayer
from pws.standardize import constants, result_dtype


class Together:
    """What `standardize_together` returns; `remove` undoes it."""

    def __init__(self, model: nn.Module, hooks: Hooks) -> None:
        self._handles: Final = (
            model.register_forward_pre_hook(hooks.before),
            model.register_forward_hook(hooks.after, always_call=True),
        )

    def remove(self) -> None:
        """Let each layer compute its own kernel again."""
        for handle in self._handles:
            handle.remove()


class Hooks:
    """Around the forward pass of a model."""

    def __init__(self, layers: list[StandardizedLayer]) -> None:
        self.layers = layers

    def before(self, *_: Any) -> None:
        """Compute the kernels, those of a device and its dtypes in one go."""
        if torch.compiler.is_compiling() or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
            return  # a compiler fuses the formula itself, and a graph's launches cost no Python
        groups = defaultdict(list)
        for layer in self.layers:
            weight = layer.filters()
            job = Job(weight, layer.alpha, *constants(weight, layer.gain, layer.gamma, layer.relative_gamma))
            groups[weight.device, weight.dtype, layer.alpha.dtype].append(job)
        for jobs in groups.values():
            prepare(jobs, result_dtype(jobs[0].weight))

    def after(self, *_: Any) -> None:
        """Let go of them."""
        forget(layer.filters() for layer in self.layers)


def standardize_together(model: nn.Module) -> Together:
    """Compute the kernels of all pws layers of `model` in one go at the start of each of its forward passes.

    A layer's standardization takes a GPU a few microseconds, and Python and a launch take many times that. Together it is one
    launch each way for the model, and the numbers are the same. Worth it wherever Python is what a step waits for: small
    batches and small layers. Under `torch.compile`, in CUDA graphs, under `torch.func` and in checkpointed regions each layer
    computes its own kernel as ever.

    What it costs: the gradients of all weights come together, at the end of the backward pass. Where processes exchange
    gradients while the backward pass runs (DistributedDataParallel), leave it out.

    Args:
        model: with the layers that it will have: those put in later compute their own kernels.

    Returns:
        A handle, whose `remove()` undoes it. Copies of `model` do the same as `model`; a folded one has nothing of it.

    Raises:
        PwsError: `model` has no pws layers.

    Examples:
        >>> import pws
        >>> model = nn.Sequential(pws.Conv2d(3, 8, 3), nn.ReLU(), pws.Conv2d(8, 8, 3))
        >>> handle = standardize_together(model)
    """
    layers = [layer for layer in model.modules() if isinstance(layer, StandardizedLayer)]
    if not layers:
        raise PwsError(
            f"standardize_together is for models with pws layers; {type(model).__name__} has none. pws.convert makes them of "
            "a model's own."
        )
    # A transposed convolution's filters are a new tensor each time, which nobody asks for again.
    return Together(model, Hooks([layer for layer in layers if layer.filters() is layer._parameters["weight"]]))


def remove_hooks(model: nn.Module) -> None:
    """Take what `standardize_together` added off `model` and its modules."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), Hooks):
                    del hooks[number]
                    module._forward_hooks_always_called.pop(number, None)
