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
    """One layer's standardization, beside others to be done in one go."""

    weight: Tensor
    """`(O, ...)`, in any dense layout."""
    alpha: Tensor | None
    c: float
    gamma: float


class ForwardTogether(Protocol):
    """From the weights of all layers to their kernels."""

    def __call__(self, jobs: Sequence[Job], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """The kernels in `dtype`, in the shapes and layouts of the weights; and what the backward pass needs to be saved."""


class BackwardTogether(Protocol):
    """From the gradients of all kernels to those of the weights and alphas."""

    def __call__(
        self, grads: Sequence[Tensor | None], jobs: Sequence[Job], saved: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor | None] | None]:
        """As `Backward`, in the dtypes of weight and alpha, for each layer; None where a kernel got no gradient."""


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
    forward_together: ForwardTogether | None = None
    """All layers in one launch; None: a call a layer."""
    backward_together: BackwardTogether | None = None
