"""How a batch is given to a model, and its outputs to a loss: one form for everything that runs a model.

A batch is what a DataLoader gives:

    images                                   the inputs alone
    (images, labels), [images, labels]       inputs and targets
    ((image, mask), labels)                  several inputs, in the order of the model's arguments
    ([image, image], [target, target])       a list of images of any sizes, with their targets
    {"pixel_values": ..., "labels": ...}     inputs by the names of the model's arguments; targets may be among them

A model whose `forward` has an argument called `targets`, `target`, `labels` or `label` gets the targets too. What is odd is run
by `forward(model, batch)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Final

import torch
from torch import Tensor

from pws._errors import PwsError

Loss = Callable[..., Any]
Forward = Callable[[Any, Any], Any]
"""`forward(model, batch)` gives the model's outputs."""
REJECTIONS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
"""What models and losses raise for an input that they can't take. Anything else is a bug of theirs, and goes through."""
TOTALS: Final = ("loss", "total_loss", "loss_total")
"""The names of the sum in a dict of losses."""
TARGETS: Final = ("targets", "target", "labels", "label")
"""The names of a model's argument for its targets."""


@dataclass(frozen=True)
class Batch:
    """Inputs of the model, and the targets of the loss where there are any."""

    inputs: Any
    targets: Any
    has_targets: bool
    forward: Callable[[Any], Any] | None = None
    """Runs a model in place of what `outputs` does."""

    def outputs(self, model: Callable[..., Any]) -> Any:
        """`model(tensor)`, `model(*arguments)` or `model(**dict)`, with the targets where the model takes them."""
        if self.forward is not None:
            return self.forward(model)
        takes = _parameters(model)
        given = self.inputs if isinstance(self.inputs, Mapping) else {}
        name = next((name for name in TARGETS if name in takes and name not in given), None)
        named = {name: self.targets} if name and self.has_targets else {}
        if isinstance(self.inputs, Mapping):
            return model(**self.inputs, **named)
        return (
            model(*self.inputs, **named) if _are_arguments(self.inputs, takes, named) else model(self.inputs, **named)
        )

    def loss(self, loss: Loss | None, outputs: Any) -> Any:
        """`loss(outputs, targets)`, or `loss(outputs)` where it takes no more or there are no targets.

        Without a loss the outputs are the losses.
        """
        if loss is None:
            return total(outputs)
        takes_targets = self.has_targets and _binds(_parameters(loss), 2)
        return total(loss(outputs, self.targets) if takes_targets else loss(outputs))


def takes_targets(model: Callable[..., Any]) -> bool:
    """Whether its forward has an argument for the targets."""
    takes = _parameters(model)
    return any(name in takes for name in TARGETS)


def batch_of(given: Any, forward: Forward | None = None) -> Batch:
    """Read a batch. A tensor or a dict is the inputs alone; a pair is `(inputs, targets)`, a 1-tuple `(inputs,)`.

    With `forward` it may be anything; what is no pair is handed to the loss as the targets.

    Raises:
        PwsError: anything else, or there is no sample in it.
    """
    if isinstance(given, tuple | list) and len(given) in (1, 2):
        batch = Batch(given[0], given[1] if len(given) == 2 else None, len(given) == 2)
    elif isinstance(given, Tensor | Mapping):
        batch = Batch(given, None, False)
    elif forward is not None:
        batch = Batch(given, given, True)
    else:
        got = f"{type(given).__name__} of {len(given)}" if isinstance(given, tuple | list) else type(given).__name__
        raise PwsError(
            f"a batch is (inputs, targets), or the inputs alone; got {got}. Inputs are a tensor, a tuple or dict of the "
            "model's arguments, or a list of images. Several inputs go into a tuple of their own: ((image, mask), target). "
            "For any other form pass forward=, a function of (model, batch)."
        )
    _check_samples(batch.inputs)
    if forward is None:
        return batch
    run, whole = forward, given
    return Batch(batch.inputs, batch.targets, batch.has_targets, lambda model: run(model, whole))


def example_of(model: Callable[..., Any], given: Any, forward: Forward | None = None) -> Batch:
    """Read a batch for a run without a loss: it may also be a tuple of all arguments, or a list of images alone.

    Raises:
        PwsError: see `batch_of`.
    """
    if forward is None and isinstance(given, tuple | list):
        takes = _parameters(model)
        all_arguments = len(given) > 1 and not isinstance(given[0], tuple) and _binds(takes, len(given))
        if _are_images(given, takes) or all_arguments:
            _check_samples(given)
            return Batch(given, None, False)
    return batch_of(given, forward)


def total(value: Any) -> Any:
    """Return the scalar of a loss: itself, what is called `loss` or `total_loss` in it, or the sum of a dict."""
    named = next((value[name] for name in TOTALS if name in value), None) if isinstance(value, Mapping) else None
    if named is not None:
        return total(named)
    if not isinstance(value, Tensor | Mapping) and isinstance(getattr(value, "loss", None), Tensor):
        return value.loss
    if isinstance(value, Mapping):
        losses = [tensor for tensor in tensors_in(value) if tensor.requires_grad] or list(tensors_in(value))
        if losses and all(tensor.numel() == 1 for tensor in losses):
            return torch.stack([loss.reshape(()) for loss in losses]).sum()
    return value


def on_device(value: Any, device: torch.device) -> Any:
    """The same with all tensors on a device: a batch, or nested tuples, lists and dicts."""
    if isinstance(value, Batch):
        return Batch(
            on_device(value.inputs, device), on_device(value.targets, device), value.has_targets, value.forward
        )
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: on_device(item, device) for key, item in value.items()}
    return type(value)(on_device(item, device) for item in value) if isinstance(value, tuple | list) else value


def check_finite(values: Any, role: str) -> None:
    """Raise `PwsError` if a tensor among the inputs or targets holds NaN or infinity: the cause of others."""
    for tensor in tensors_in(values):
        if not tensor.is_floating_point() or tensor.is_meta:
            continue
        bad = count_bad(tensor)
        if bad:
            raise PwsError(
                f"the batch's {role} must be finite; got {bad:,} NaN or infinite of {tensor.numel():,} entries, in the {role} "
                f"of shape {tuple(tensor.shape)}, and they reach the network or its loss. Mend the data or its normalization: "
                "no network can train on it."
            )


def count_bad(tensor: Tensor) -> int:
    """How many entries are NaN or infinity. Minus infinity is what masks are made of."""
    return int((tensor.isnan() | tensor.isposinf()).sum())


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def _check_samples(inputs: Any) -> None:
    tensors = list(tensors_in(inputs))
    if tensors and not any(tensor.numel() for tensor in tensors):
        raise PwsError(f"a batch needs at least one sample; got an input of shape {tuple(tensors[0].shape)}.")


def _are_arguments(inputs: Any, takes: Mapping[str, inspect.Parameter], named: Mapping[str, Any]) -> bool:
    """Whether a sequence is several arguments of the model, and not one argument: a list of images."""
    if not isinstance(inputs, tuple | list) or _are_images(inputs, takes):
        return False
    if len(inputs) == 1:
        return isinstance(inputs, tuple) and not (named and _is_one_each(inputs, *named.values()))
    return _binds(takes, len(inputs), *named)


def _is_one_each(inputs: tuple[Any, ...], targets: Any) -> bool:
    return isinstance(targets, tuple | list) and len(targets) == len(inputs)


def _are_images(inputs: tuple[Any, ...] | list[Any], takes: Mapping[str, inspect.Parameter]) -> bool:
    """Whether this is a list of images `(C, H, W)` for a model that takes such, and no second argument or one for targets."""
    images = isinstance(inputs, list) and all(isinstance(item, Tensor) and item.dim() == 3 for item in inputs)
    return images and (any(name in takes for name in TARGETS) or not _binds(takes, len(inputs)))


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The arguments of a function, or of a module's forward; those of any function if they can't be told."""
    try:
        return inspect.signature(getattr(function, "forward", function)).parameters
    except (TypeError, ValueError):
        return inspect.signature(lambda *args, **kwargs: None).parameters


def _binds(takes: Mapping[str, inspect.Parameter], count: int, *names: str) -> bool:
    """Whether so many arguments by position, and these by name, can be given."""
    try:
        inspect.Signature(list(takes.values())).bind(*range(count), **dict.fromkeys(names))
    except TypeError:
        return False
    return True
