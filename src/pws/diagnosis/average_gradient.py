"""How much all weights of a filter are pushed alike."""

from __future__ import annotations

from torch import Tensor


def average_gradient_ratio(grad: Tensor) -> Tensor:
    """`(sum_i g_i)^2 / (n sum_i g_i^2)` of each filter, `(out_channels,)`, in [0, 1].

    `1 / n` is what independent gradients would give, 1 means that all weights are pushed alike; a filter without
    gradient has 0. `grad` is `(out_channels, ...)`, the loss's gradient by the weight. Source: paper section 3.
    """
    grad_OK = grad.flatten(1).double()
    squares_O = grad_OK.square().sum(1) * grad_OK.shape[1]
    return grad_OK.sum(1).square() / squares_O.clamp(min=1e-300)
