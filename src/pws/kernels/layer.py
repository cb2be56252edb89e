"""A marked layer in one step of an optimizer: its tensors, a filter an entry of the leading dimension, and its settings.

Shape letters: O filters (output channels), K entries of a filter (the fan-in n).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class SGDRates(NamedTuple):
    """What SGD multiplies with."""

    lr: float
    alpha_lr: float
    bias_lr: float
    decay: float
    bias_decay: float
    momentum: float
    nesterov: bool


class AdamWRates(NamedTuple):
    """What AdamW multiplies with."""

    lr: float
    alpha_lr: float
    bias_lr: float
    decay: float
    bias_decay: float
    beta1: float
    beta2: float
    eps: float
    correction1: float
    """`1 - beta1^t` after `t` steps."""
    correction2: float


@dataclass(slots=True)
class Layer:
    """The tensors of a layer, and how it moves. Those of a sharded layer are the filters of this process."""

    name: str
    c: float
    """`gain / sqrt(n)`."""
    gamma: float
    """What is added to the variance."""
    kernel: Tensor
    """`(O, ...)`."""
    is_copy: bool
    """Whether `kernel` is a copy of the weight, whose filters are not dense in memory."""
    w: Tensor
    """Laid out as the kernel."""
    alpha: Tensor
    """`(O,)`."""
    bias: Tensor | None
    moments: list[Tensor]
    """The moments of `w`: SGD's momentum buffer, AdamW's averages; laid out as the kernel."""
    alpha_moments: list[Tensor]
    bias_moments: list[Tensor]
    grad_dtype: torch.dtype
    grad: Tensor | None = None
    """The kernel's gradient, laid out as the kernel."""
    bias_grad: Tensor | None = None
    rates: Any = None
    peaks: tuple[float, float, float] = field(default=(1.0, 1.0, 1.0))
    """The largest rates of a schedule, of weight, alpha and bias: at them a gradient step is measured."""

    @property
    def fan_in(self) -> int:
        """Entries of a filter."""
        return self.w.shape[1:].numel()
