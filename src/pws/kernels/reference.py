"""The step in stock operators, a layer at a time: every device and dtype, and what the fused steps are held to.

With the kernel's gradient `G`, `h = (w - m) r`, `r = 1 / sqrt(v + gamma)` and `c = gain / sqrt(n)` (paper section 2):

    d alpha_o = c sum(G_o h_o)
    d w_o     = c alpha_o r_o (G_o - mean(G_o) - h_o mean(G_o h_o))
    |d w_o|^2 = (c alpha_o r_o)^2 (sum G^2 - (sum G)^2 / n - (sum G h)^2 (2 / n - sum h^2 / n^2))

Shape letters: O filters, K entries of a filter (the fan-in n), L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pws.kernels.layer import AdamWRates, Layer, SGDRates


@dataclass
class _Sums:
    """Sums over each filter of a layer, `(O, 1)` each."""

    mean: Tensor
    rstd: Tensor
    grad: Tensor
    """`mean(G)`."""
    along: Tensor
    """`mean(G h)`."""


class ReferenceStep:
    """One step of some layers: `squares`, then `sgd`; or `squares`, `adamw_squares`, then `adamw`."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self._sums: list[_Sums] = []

    def squares(self) -> Tensor:
        """The squared length of each layer's gradient step `(L,)`, weight, alpha and bias together, each at its largest rate.

        Not finite where a gradient isn't.
        """
        self._sums = [_sums(layer) for layer in self.layers]
        return torch.stack([_square(layer, sums) for layer, sums in zip(self.layers, self._sums, strict=True)])

    @staticmethod
    def serves(layer: Layer) -> bool:
        """Every layer."""
        return True

    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        """Return every layer's gradients of `w`, as `(O, K)`, and of alpha; call `squares` before."""
        return [_gradients(layer, sums) for layer, sums in zip(self.layers, self._sums, strict=True)]

    def sgd(self, factors: Tensor) -> None:
        """Move every layer by SGD, its gradients times `factors` `(L,)`."""
        for layer, sums, factor in zip(self.layers, self._sums, factors, strict=True):
            rates: SGDRates = layer.rates
            dw_OK, dalpha_O = _gradients(layer, sums)
            _sgd(rows(layer.w), dw_OK * factor, rates, rates.lr, rates.decay, _rows(layer.moments))
            _sgd(layer.alpha, dalpha_O * factor, rates, rates.alpha_lr, 0.0, layer.alpha_moments)
            if layer.bias is not None and layer.bias_grad is not None:
                grad = layer.bias_grad * factor.to(layer.bias.dtype)
                _sgd(layer.bias, grad, rates, rates.bias_lr, rates.bias_decay, layer.bias_moments)
            write_kernel(layer)

    def adamw_squares(self) -> Tensor:
        """Update AdamW's averages; the squared length of the step that they ask for, decay included, `(L,)`."""
        found = []
        for layer, sums in zip(self.layers, self._sums, strict=True):
            rates: AdamWRates = layer.rates
            dw_OK, dalpha_O = _gradients(layer, sums)
            _average(dw_OK, rates, _rows(layer.moments))
            _average(dalpha_O, rates, layer.alpha_moments)
            if layer.bias_grad is not None:
                _average(layer.bias_grad, rates, layer.bias_moments)
            squares = [sum_of_squares(change).to(sums.mean.dtype) for _, change in _changes(layer)]
            found.append(torch.stack(squares).sum())
        return torch.stack(found)

    def adamw(self, factors: Tensor) -> None:
        """Move every layer by AdamW, its step times `factors` `(L,)`."""
        for layer, factor in zip(self.layers, factors, strict=True):
            for tensor, change in _changes(layer):
                tensor.add_(change * factor.to(change.dtype))
            write_kernel(layer)


def rows(tensor: Tensor) -> Tensor:
    """A layer's tensor `(O, ...)` as `(O, K)` in the order of its memory: a view."""
    order = [0, *sorted(range(1, tensor.dim()), key=tensor.stride, reverse=True)]
    return tensor.permute(order).flatten(1)


def sum_of_squares(tensor: Tensor) -> Tensor:
    """Sum the squares of all entries, in float32 at least."""
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
    return norm.square()


def write_kernel(layer: Layer) -> None:
    """`kernel = c alpha (w - m) r`."""
    w_OK = rows(layer.w)
    mean_O1, rstd_O1 = _statistics(w_OK, layer.gamma)
    rows(layer.kernel).copy_((w_OK - mean_O1) * (layer.c * layer.alpha[:, None] * rstd_O1))


def _rows(tensors: list[Tensor]) -> list[Tensor]:
    return [rows(tensor) for tensor in tensors]


def _statistics(w_OK: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Mean and `1 / sqrt(v + gamma)` of each filter."""
    mean_O1 = w_OK.mean(1, keepdim=True)
    return mean_O1, ((w_OK - mean_O1).square().mean(1, keepdim=True) + gamma).rsqrt()


def _sums(layer: Layer) -> _Sums:
    w_OK = rows(layer.w)
    G_OK = _gradient(layer)
    mean_O1, rstd_O1 = _statistics(w_OK, layer.gamma)
    along_O1 = (G_OK * (w_OK - mean_O1)).mean(1, keepdim=True) * rstd_O1
    return _Sums(mean_O1, rstd_O1, G_OK.mean(1, keepdim=True), along_O1)


def _square(layer: Layer, sums: _Sums) -> Tensor:
    # Of the gradients themselves: what the fused steps get from sums is compared with this.
    gradients = [*_gradients(layer, sums), *([] if layer.bias_grad is None else [layer.bias_grad])]
    squares = [rate**2 * sum_of_squares(g).to(sums.mean.dtype) for rate, g in zip(layer.peaks, gradients, strict=False)]
    return torch.stack(squares).sum()


def _gradients(layer: Layer, sums: _Sums) -> tuple[Tensor, Tensor]:
    """Return the gradients of `w`, as `(O, K)`, and of alpha."""
    w_OK, G_OK = rows(layer.w), _gradient(layer)
    h_OK = (w_OK - sums.mean) * sums.rstd
    scale_O1 = layer.c * layer.alpha[:, None] * sums.rstd
    dw_OK = scale_O1 * (G_OK - sums.grad - h_OK * sums.along)
    return dw_OK, (layer.c * layer.fan_in) * sums.along[:, 0]


def _gradient(layer: Layer) -> Tensor:
    assert layer.grad is not None
    return rows(layer.grad).to(layer.w.dtype)


def _sgd(tensor: Tensor, grad: Tensor, rates: SGDRates, lr: float, decay: float, moments: list[Tensor]) -> None:
    if decay:
        grad = grad + decay * tensor
    if moments:
        (buffer,) = moments
        buffer.mul_(rates.momentum).add_(grad)
        grad = grad + rates.momentum * buffer if rates.nesterov else buffer
    tensor.sub_(lr * grad)


def _average(grad: Tensor, rates: AdamWRates, moments: list[Tensor]) -> None:
    first, second = moments
    first.lerp_(grad, 1 - rates.beta1)
    second.mul_(rates.beta2).addcmul_(grad, grad, value=1 - rates.beta2)


def _changes(layer: Layer) -> list[tuple[Tensor, Tensor]]:
    """AdamW's step: `-lr (m / c1 / (sqrt(v / c2) + eps) + decay x)` of each tensor `x` of the layer."""
    rates: AdamWRates = layer.rates
    moved = [(rows(layer.w), _rows(layer.moments), rates.lr, rates.decay)]
    moved.append((layer.alpha, layer.alpha_moments, rates.alpha_lr, 0.0))
    if layer.bias is not None and layer.bias_grad is not None:
        moved.append((layer.bias, layer.bias_moments, rates.bias_lr, rates.bias_decay))
    found = []
    for tensor, (first, second), lr, decay in moved:
        root = (second / rates.correction2).sqrt() + rates.eps
        found.append((tensor, -lr * (first / rates.correction1 / root + decay * tensor)))
    return found
