"""What a backend is: the standardization of a weight `(O, K)`, forward and backward, for the tensors it serves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Forward(Protocol):
    """From a weight to its kernel."""

    def __call__(
        self, weight_OK: Tensor, alpha_O: Tensor | None, c: float, gamma: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The kernel `(O, K)` in `dtype`, the mean `(O,)` and `1 / sqrt(v + gamma)` `(O,)` of each filter.

        The last two are float32, or float64 for a float64 weight.
        """


class Backward(Protocol):
    """From the gradient of the kernel to those of the weight and of alpha."""

    def __call__(
        self, grad_OK: Tensor, weight_OK: Tensor, alpha_O: Tensor | None, mean_O: Tensor, rstd_O: Tensor, c: float
    ) -> tuple[Tensor, Tensor]:
        """The gradient of the weight, in its dtype, and that of an alpha `(O,)`, in the statistics' dtype."""


class Job(NamedTuple):
    """One layer's standardization, beside others that are done together."""

    weight: Tensor
    """`(O, ...)`: the entries of a filter next to each other in memory, in any order."""
    alpha: Tensor
    """`(O,)`, contiguous."""
    c: float
    gamma: float


class Plan(Protocol):
    """The standardization of many layers together, of one device and one dtype. It knows where their tensors lie, and holds
    none of them: each call brings its own, weights, then alphas."""

    constants: list[tuple[float, float]]
    """Each layer's c and gamma."""

    def __init__(self, jobs: Sequence[Job]) -> None: ...

    def forward(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The kernels in `dtype`, in the shapes and layouts of the weights; and statistics for the backward pass."""

    def backward(
        self, grads: Sequence[Tensor | None], tensors: Sequence[Tensor], statistics: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """The gradients of the weights and of the alphas; None where a kernel got none."""


@dataclass(frozen=True)
class Backend:
    """One implementation."""

    name: str
    forward: Forward
    backward: Backward
    refusal: Callable[[Tensor], str | None]
    """Why it can't serve this weight; None if it can."""
    overwriting: Backward | None = None
    """The backward pass for a gradient that nobody needs afterwards: its memory may hold the result."""
    plan: type[Plan] | None = None
    """For all layers in one launch; None: a call a layer."""
