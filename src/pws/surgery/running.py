"""Running a model so that what is in it can be seen, with its state left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.hooks import RemovableHandle

from pws._batch import tensors_in
from pws._preserve import random_state


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, then each module as it was."""
    with _modes_kept(model):
        model.eval()
        yield


@contextmanager
def branches_run(model: nn.Module) -> Iterator[None]:
    """The model in train mode, where heads run that training alone needs, but with BatchNorm and dropout in eval mode, so
    that any batch size does; then each module, and all random numbers, as they were."""
    with _modes_kept(model), random_kept(model):
        model.train()
        for module in model.modules():
            if isinstance(module, _BatchNorm | _DropoutNd):
                module.eval()
        yield


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def random_kept(model: nn.Module) -> Iterator[None]:
    """Random numbers go on behind it as if nothing had run."""
    rewind = random_state(model)
    try:
        yield
    finally:
        rewind()


@contextmanager
def hooked(layers: Sequence[nn.Module], hook: Callable[..., Tensor | None]) -> Iterator[None]:
    """The layers with a forward hook `(layer, args, kwargs, output)`."""
    with removed_after([layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]):
        yield


@contextmanager
def removed_after(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Hooks for a while."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first tensor that a module is called with, by position or by name; None if there is none."""
    return next(tensors_in((*args, *kwargs.values())), None)
