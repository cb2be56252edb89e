"""All kernels of a model in one go before each forward pass: `standardize_together`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from pws.errors import PwsError
from pws.kernels.autocast import result_dtype
from pws.kernels.backend import Job, Plan
from pws.kernels.observed import captures, is_plain, somebody_observes, stream
from pws.kernels.registry import chosen, traced_operators
from pws.kernels.together import can_be_planned, plan_for, prepare
from pws.layers import StandardizedLayer
from pws.standardize import constants

LARGEST_ON_CPU: Final = 524_288
"""Entries of a weight."""


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
        for layer in layers:
            layer.__dict__["prepared"] = None  # of its own from the start: compiled programs check for changes
        self._planned: tuple[list[Any], list[_Group]] = ([], [])
        """What the plans were made from, and the plans."""
        self._traced = traced_operators()

    def before(self, model: nn.Module, *_: Any) -> None:
        """Compute the kernels."""
        if torch.compiler.is_compiling():
            self._trace()
        elif not (captures() or somebody_observes() or getattr(model, "_is_replica", False)):
            self._compute()  # a graph's launches cost no Python; DataParallel's replicas have layers of their own

    def _compute(self) -> None:
        pairs = self._pairs()
        if not all(map(_is_usual, chain.from_iterable(pairs))):
            return
        now = [chosen(), stream(), *map(_place, pairs), *((x.gain, x.gamma, x.relative_gamma) for x in self.layers)]
        planned = self._planned
        if planned[0] != now:
            planned = self._planned = now, self._plan(pairs)
        for group in planned[1]:
            group.prepare(pairs, self.layers)

    def after(self, *_: Any) -> None:
        """Let go of them."""
        for layer in self.layers:
            if torch.compiler.is_compiling():
                if layer.prepared is not None:  # a side effect that a compiler would report, and export warn of
                    layer.prepared = None
            else:
                layer.__dict__["prepared"] = None  # a module's own __setattr__ takes twenty times as long

    def _trace(self) -> None:
        """Have a compiled program compute the kernels in one launch, where its own would be one a layer. On a CPU it needs no
        launches, and fuses the formula itself; without gradients a model is best folded."""
        if self._traced is None or not torch.is_grad_enabled() or torch.compiler.is_exporting():
            return
        layers = [layer for layer, (weight, _) in zip(self.layers, self._pairs(), strict=True) if _trains(weight)]
        weights, alphas = [x._parameters["weight"] for x in layers], [x._parameters["alpha"] for x in layers]
        if not layers or not self._traced.serves(weights, alphas):
            return
        settings = [constants(x.filters(), x.gain, x.gamma, x.relative_gamma) for x in layers]
        c, gamma = [c for c, _ in settings], [gamma for _, gamma in settings]
        kernels = self._traced.Traced.apply(c, gamma, result_dtype(layers[0].filters()), *weights, *alphas)
        for layer, kernel in zip(layers, kernels, strict=True):
            layer.prepared = kernel

    def _pairs(self) -> list[tuple[Any, Any]]:
        """The weights and alphas of now; None for a weight that is no parameter any more, but pruned or parametrized."""
        return [(layer._parameters.get("weight"), layer._parameters.get("alpha")) for layer in self.layers]

    def _plan(self, pairs: list[tuple[Any, Any]]) -> list[_Group]:
        together = defaultdict(list)
        for i, (layer, (weight, alpha)) in enumerate(zip(self.layers, pairs, strict=True)):
            if weight is not None and _gains(weight) and can_be_planned(weight, alpha):
                settings = constants(weight, layer.gain, layer.gamma, layer.relative_gamma)
                together[weight.device, weight.dtype].append((i, Job(weight.detach(), alpha.detach(), *settings)))
        return [_Group([i for i, _ in group], plan_for([job for _, job in group])) for group in together.values()]

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers}  # plans are of one place in memory, operators of one machine

    def __setstate__(self, state: dict[str, Any]) -> None:
        Hooks.__init__(self, **state)


class _Group(NamedTuple):
    """Layers of one device and one dtype."""

    numbers: list[int]
    plan: Plan

    def prepare(self, pairs: Sequence[tuple[Any, Any]], layers: Sequence[StandardizedLayer]) -> None:
        weights, alphas = zip(*(pairs[i] for i in self.numbers), strict=True)
        for i, prepared in zip(self.numbers, prepare(self.plan, weights, alphas), strict=True):
            layers[i].__dict__["prepared"] = prepared


def _place(pair: tuple[Any, Any]) -> tuple[Any, ...]:
    """Where weight and alpha lie, and how."""
    return tuple([None if t is None else (t.data_ptr(), t.dtype, t.shape, t.stride()) for t in pair])


def _gains(weight: Tensor) -> bool:
    """On a CPU what one pass over a large kernel costs is more than Python, and it is best read while it is in the cache."""
    return weight.device.type != "cpu" or weight.numel() <= LARGEST_ON_CPU


def _is_usual(tensor: Any) -> bool:
    return tensor is None or (is_plain(tensor) and not tensor.is_inference())


def _trains(weight: Any) -> bool:
    return weight is not None and is_plain(weight) and weight.requires_grad


def standardize_together(model: nn.Module) -> Together:
    """Compute the kernels of the pws layers of `model` in one go at the start of each of its forward passes.

    A layer's standardization takes a GPU a few microseconds, and Python and a launch take many times that. Together it is one
    launch each way for the model, and the numbers are the same. Worth it wherever Python is what a step waits for: small
    batches and small layers. On a CPU there is no launch to save, and weights of more than 524,288 entries stay apart. A model
    that is compiled for a GPU calls one operator each way in place of a kernel a layer.

    A layer that would not compute just this kernel when its turn comes computes its own as ever: in checkpointed regions, where
    autocast or the gradient mode is another, in another thread or stream, under `torch.func`, in CUDA graphs, and when its
    parameters were changed meanwhile (in a compiled program, and in place through `.data`, that is not noticed). Transposed,
    pruned and parametrized layers do so always.

    What it costs: all kernels exist at once, and the gradients of all weights come together, at the end of the backward pass.
    Leave it out where processes exchange gradients while the backward pass runs (DistributedDataParallel). In a compiled
    program a layer that a pass does not use gets a gradient of zeros, not None.

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
    remove_hooks(model)  # twice would be for nothing
    # A transposed convolution's filters are a new tensor each time, which nobody asks for again.
    return Together(model, Hooks([layer for layer in layers if layer.filters() is layer._parameters.get("weight")]))


def remove_hooks(model: nn.Module) -> None:
    """Take what `standardize_together` added off `model` and its modules."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), Hooks):
                    del hooks[number]
                    module._forward_hooks_always_called.pop(number, None)
