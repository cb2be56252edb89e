"""How a batch is given to a model, and its outputs to a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor

from pws.errors import PwsError

Loss = Callable[..., Tensor]
REJECTIONS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
"""What models and losses raise of an input that they can't take; anything else is a bug of theirs, and goes through."""


@dataclass(frozen=True)
class Batch:
    """Inputs of the model, and the targets of the loss where there are any."""

    inputs: Any
    targets: Any
    has_targets: bool

    def outputs(self, model: Callable[..., Any]) -> Any:
        """`model(tensor)`, `model(*tuple)` or `model(**dict)`."""
        if isinstance(self.inputs, Mapping):
            return model(**self.inputs)
        return model(*self.inputs) if isinstance(self.inputs, tuple | list) else model(self.inputs)

    def loss(self, loss: Loss, outputs: Any) -> Any:
        """`loss(outputs, targets)`, or `loss(outputs)` without targets."""
        return loss(outputs, self.targets) if self.has_targets else loss(outputs)


def batch_of(given: Any) -> Batch:
    """A tensor or a dict is the inputs alone; a pair is `(inputs, targets)`, a 1-tuple `(inputs,)`.

    Raises:
        PwsError: anything else, or inputs that hold NaN or infinity.
    """
    if isinstance(given, tuple | list) and len(given) in (1, 2):
        batch = Batch(given[0], given[1] if len(given) == 2 else None, len(given) == 2)
    elif isinstance(given, Tensor | Mapping):
        batch = Batch(given, None, False)
    else:
        got = f"{type(given).__name__} of {len(given)}" if isinstance(given, tuple | list) else type(given).__name__
        raise PwsError(
            "a batch is (inputs, targets), or the inputs alone, where inputs is a tensor, a tuple of the model's arguments "
            f"or a dict of them; got {got}. Several inputs go into a tuple of their own: ((image, mask), target)."
        )
    check_finite(batch.inputs, "input")
    check_finite(batch.targets, "target")
    return batch


def check_finite(values: Any, role: str) -> None:
    """Raise `PwsError` if a tensor among the inputs or targets is empty or holds NaN or infinity."""
    for tensor in tensors_in(values):
        if not tensor.numel():
            raise PwsError(f"a batch needs at least one sample; got an {role} of shape {tuple(tensor.shape)}.")
        if tensor.is_floating_point() and not tensor.is_meta and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise PwsError(
                f"the batch's {role} must be finite; got {bad:,} NaN or infinite of {tensor.numel():,} entries, in the {role} "
                f"of shape {tuple(tensor.shape)}. Mend the data or its normalization: no network can train on it."
            )


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
    elif is_dataclass(value):
        yield from tensors_in(vars(value))
