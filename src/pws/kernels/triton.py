"""The step on a GPU: two launches for all layers of the model, three for AdamW, a program per filter.

A program finds its layer's tensors by their addresses, in a table on the GPU. The formulas are those of
`pws.kernels.reference`; sums are in float32.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from itertools import chain
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from pws.kernels.layer import Layer

INTERPRETED: Final = os.environ.get("TRITON_INTERPRET") == "1"
TYPES: Final = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
BLOCK: Final = 1024
"""Entries of a filter in the registers of a program at once."""
MOST_TABLES: Final = 64
"""Addresses repeat from step to step, for the allocator hands out the same memory: what was uploaded serves again."""

# Columns of the table of addresses (0 for a tensor that is not there) ...
GRAD, W, KERNEL, ALPHA, BIAS, BIAS_GRAD = (tl.constexpr(i) for i in range(6))
FIRST, SECOND, ALPHA_FIRST, ALPHA_SECOND, BIAS_FIRST, BIAS_SECOND = (tl.constexpr(i) for i in range(6, 12))
ADDRESSES: Final = tl.constexpr(12)
# ... of that of numbers ...
C, GAMMA, PEAK, ALPHA_PEAK, BIAS_PEAK = (tl.constexpr(i) for i in range(5))
LR, ALPHA_LR, BIAS_LR, DECAY, BIAS_DECAY = (tl.constexpr(i) for i in range(5, 10))
MOMENTUM, NESTEROV = tl.constexpr(10), tl.constexpr(11)
BETA1, BETA2, EPS, CORRECTION1, CORRECTION2 = (tl.constexpr(i) for i in range(10, 15))
NUMBERS: Final = tl.constexpr(15)
# ... and of what is known of a filter.
MEAN, RSTD, MEAN_GRAD, MEAN_ALONG, SQUARE = (tl.constexpr(i) for i in range(5))
KNOWN: Final = tl.constexpr(5)


class TritonStep:
    """See `pws.kernels.choose.Step`: float32, bfloat16 and float16 models on a GPU; latents are float32."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self._device = layers[0].w.device
        filters = [len(layer.w) for layer in layers]
        lengths = torch.tensor(filters, device="cpu")
        rows = torch.stack(
            [
                torch.repeat_interleave(torch.arange(len(layers), device="cpu"), lengths),
                torch.cat([torch.arange(count, device="cpu") for count in filters]),
                torch.repeat_interleave(torch.tensor([layer.fan_in for layer in layers], device="cpu"), lengths),
            ],
            dim=1,
        )
        self._rows, self._lengths = self._uploaded(rows), self._uploaded(lengths)
        self._filters = torch.empty(len(rows), int(KNOWN.value), dtype=torch.float32, device=self._device)
        self._tables: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()
        self._types = {
            "kernel_type": TYPES[layers[0].kernel.dtype],
            "grad_type": TYPES[layers[0].grad_dtype],
            "bias_type": TYPES[layers[0].kernel.dtype if layers[0].bias is None else layers[0].bias.dtype],
        }

    @staticmethod
    def serves(layer: Layer) -> bool:
        """Whether it is on a GPU, in a type that Triton has, with float32 latents."""
        types = {layer.kernel.dtype, layer.grad_dtype, layer.kernel.dtype if layer.bias is None else layer.bias.dtype}
        return types <= set(TYPES) and layer.w.dtype == torch.float32 and (INTERPRETED or layer.w.is_cuda)

    def squares(self) -> Tensor:
        """See `Step`."""
        addresses = tuple(chain.from_iterable(map(_addresses, self.layers)))
        numbers = tuple(chain.from_iterable(map(_numbers, self.layers)))
        self._at, self._numbers = self._table(addresses, torch.int64), self._table(numbers, torch.float32)
        self._launch(_sums)
        return self._by_layer()

    def sgd(self, factors: Tensor) -> None:
        """See `Step`."""
        self._launch(_sgd, factors)

    def adamw_squares(self) -> Tensor:
        """See `Step`."""
        self._launch(_adamw_averages)
        return self._by_layer()

    def adamw(self, factors: Tensor) -> None:
        """See `Step`."""
        self._launch(_adamw, factors)

    def _launch(self, kernel: Any, *more: Tensor) -> None:
        if len(self._rows):
            with torch.cuda.device_of(self._filters):
                tables = (self._at, self._numbers, self._rows, self._filters)
                kernel[(len(self._rows),)](*tables, *more, **self._types, block=BLOCK, num_warps=4)

    def _by_layer(self) -> Tensor:
        # In order, so that the sum has the same bits in every run.
        return torch.segment_reduce(
            self._filters[:, SQUARE.value].contiguous(), "sum", lengths=self._lengths, unsafe=True
        )

    def _table(self, values: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
        found = self._tables.get(values)
        if found is None:
            found = self._tables[values] = self._uploaded(torch.tensor(values, dtype=dtype, device="cpu"))
            if len(self._tables) > MOST_TABLES:
                self._tables.popitem(last=False)
        return found

    def _uploaded(self, table: Tensor) -> Tensor:
        return table.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else table


def _addresses(layer: Layer) -> list[int]:
    averages = [[*of, None, None][:2] for of in (layer.moments, layer.alpha_moments, layer.bias_moments)]
    tensors = [
        layer.grad,
        layer.w,
        layer.kernel,
        layer.alpha,
        layer.bias,
        layer.bias_grad,
        *chain.from_iterable(averages),
    ]
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _numbers(layer: Layer) -> list[float]:
    numbers = [layer.c, layer.gamma, *layer.peaks, *map(float, layer.rates)]
    return numbers + [0.0] * (int(NUMBERS.value) - len(numbers))


@triton.jit
def _tensor(at, layer, column, kind: tl.constexpr):
    """A layer's tensor."""
    return tl.load(at + layer * ADDRESSES + column).to(tl.pointer_type(kind))


@triton.jit
def _number(numbers, layer, column):
    return tl.load(numbers + layer * NUMBERS + column)


@triton.jit
def _place(rows):
    """Layer, filter and fan-in of this program."""
    row = tl.program_id(0)
    return row, tl.load(rows + 3 * row), tl.load(rows + 3 * row + 1), tl.load(rows + 3 * row + 2).to(tl.int32)


@triton.jit
def _statistics(w, count, gamma, block: tl.constexpr):
    """Mean and `1 / sqrt(v + gamma)` of a filter, in two passes: a large mean costs no digits."""
    k = tl.arange(0, block)
    totals = tl.zeros([block], tl.float32)
    for start in range(0, count, block):
        totals += tl.load(w + start + k, mask=start + k < count, other=0.0)
    mean = tl.sum(totals) / count
    squares = tl.zeros([block], tl.float32)
    for start in range(0, count, block):
        inside = start + k < count
        centred = tl.where(inside, tl.load(w + start + k, mask=inside, other=0.0) - mean, 0.0)
        squares += centred * centred
    return mean, 1.0 / tl.sqrt(tl.sum(squares) / count + gamma)


@triton.jit
def _write(w, kernel, scale, count, gamma, block: tl.constexpr):
    """The kernel of a filter."""
    mean, rstd = _statistics(w, count, gamma, block)
    k = tl.arange(0, block)
    for start in range(0, count, block):
        inside = start + k < count
        value = (tl.load(w + start + k, mask=inside, other=0.0) - mean) * (scale * rstd)
        tl.store(kernel + start + k, value.to(kernel.dtype.element_ty), mask=inside)


@triton.jit
def _sums(at, numbers, rows, filters, kernel_type: tl.constexpr, grad_type: tl.constexpr, bias_type: tl.constexpr, block: tl.constexpr):  # noqa: E501  # fmt: skip
    """Write for each filter: statistics, sums, and the squared length of its gradient step."""
    row, layer, o, count = _place(rows)
    w = _tensor(at, layer, W, tl.float32) + o * count
    grad = _tensor(at, layer, GRAD, grad_type) + o * count
    c, gamma = _number(numbers, layer, C), _number(numbers, layer, GAMMA)
    mean, rstd = _statistics(w, count, gamma, block)
    k = tl.arange(0, block)
    totals, squares, products = (
        tl.zeros([block], tl.float32),
        tl.zeros([block], tl.float32),
        tl.zeros([block], tl.float32),
    )
    for start in range(0, count, block):
        inside = start + k < count
        g = tl.load(grad + start + k, mask=inside, other=0.0).to(tl.float32)
        totals += g
        squares += g * g
        products += g * (tl.load(w + start + k, mask=inside, other=0.0) - mean)
    total, along = tl.sum(totals), tl.sum(products) * rstd
    # sum h^2 / n = v r^2 = 1 - gamma r^2
    rest = tl.sum(squares) - total * total / count - along * along / count * (1 + gamma * rstd * rstd)
    rest = tl.where(rest < 0, 0.0, rest)  # by rounding; NaN stays
    step = _number(numbers, layer, PEAK) * c * tl.load(_tensor(at, layer, ALPHA, tl.float32) + o) * rstd
    of_alpha = _number(numbers, layer, ALPHA_PEAK) * c * along
    square = step * step * rest + of_alpha * of_alpha
    bias_grad = _tensor(at, layer, BIAS_GRAD, bias_type)
    if tl.load(at + layer * ADDRESSES + BIAS_GRAD) != 0:
        of_bias = _number(numbers, layer, BIAS_PEAK) * tl.load(bias_grad + o).to(tl.float32)
        square += of_bias * of_bias
    known = filters + row * KNOWN
    tl.store(known + MEAN, mean)
    tl.store(known + RSTD, rstd)
    tl.store(known + MEAN_GRAD, total / count)
    tl.store(known + MEAN_ALONG, along / count)
    tl.store(known + SQUARE, square)


@triton.jit
def _sgd_value(value, grad, buffer, mask, lr, decay, momentum, nesterov):
    """Values by SGD; their momentum is stored."""
    step = grad + decay * value
    if momentum != 0:
        moved = momentum * tl.load(buffer, mask=mask, other=0.0).to(tl.float32) + step
        tl.store(buffer, moved.to(buffer.dtype.element_ty), mask=mask)
        step = tl.where(nesterov != 0, step + momentum * moved, moved)
    return value - lr * step


@triton.jit
def _sgd(at, numbers, rows, filters, factors, kernel_type: tl.constexpr, grad_type: tl.constexpr, bias_type: tl.constexpr, block: tl.constexpr):  # noqa: E501  # fmt: skip
    """Every layer by SGD, its gradients times its factor."""
    row, layer, o, count = _place(rows)
    w = _tensor(at, layer, W, tl.float32) + o * count
    grad = _tensor(at, layer, GRAD, grad_type) + o * count
    buffer = _tensor(at, layer, FIRST, tl.float32) + o * count
    alpha = _tensor(at, layer, ALPHA, tl.float32) + o
    known = filters + row * KNOWN
    mean, rstd = tl.load(known + MEAN), tl.load(known + RSTD)
    centre, along = tl.load(known + MEAN_GRAD), tl.load(known + MEAN_ALONG)
    c, gamma, factor = _number(numbers, layer, C), _number(numbers, layer, GAMMA), tl.load(factors + layer)
    momentum, nesterov = _number(numbers, layer, MOMENTUM), _number(numbers, layer, NESTEROV)
    lr, decay = _number(numbers, layer, LR), _number(numbers, layer, DECAY)
    scale, slope = factor * c * tl.load(alpha) * rstd, along * rstd
    k = tl.arange(0, block)
    for start in range(0, count, block):
        inside = start + k < count
        g = tl.load(grad + start + k, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(w + start + k, mask=inside, other=0.0)
        of_w = scale * (g - centre - (value - mean) * slope)
        tl.store(
            w + start + k,
            _sgd_value(value, of_w, buffer + start + k, inside, lr, decay, momentum, nesterov),
            mask=inside,
        )
    one = tl.arange(0, 1)
    inside = one < 1
    alpha_buffer = _tensor(at, layer, ALPHA_FIRST, tl.float32) + o + one
    of_alpha = factor * c * along * count
    value = _sgd_value(tl.load(alpha + one), of_alpha, alpha_buffer, inside, _number(numbers, layer, ALPHA_LR), 0.0, momentum, nesterov)  # noqa: E501  # fmt: skip
    tl.store(alpha + one, value)
    if tl.load(at + layer * ADDRESSES + BIAS_GRAD) != 0:
        bias = _tensor(at, layer, BIAS, bias_type) + o + one
        bias_buffer = _tensor(at, layer, BIAS_FIRST, bias_type) + o + one
        of_bias = factor * tl.load(_tensor(at, layer, BIAS_GRAD, bias_type) + o + one).to(tl.float32)
        lr, decay = _number(numbers, layer, BIAS_LR), _number(numbers, layer, BIAS_DECAY)
        moved = _sgd_value(tl.load(bias).to(tl.float32), of_bias, bias_buffer, inside, lr, decay, momentum, nesterov)
        tl.store(bias, moved.to(bias_type))
    kernel = _tensor(at, layer, KERNEL, kernel_type) + o * count
    tl.debug_barrier()  # what other threads of the program have stored is read again
    _write(w, kernel, c * tl.sum(value), count, gamma, block)


@triton.jit
def _change(value, first, second, lr, decay, eps, correction1, correction2):
    """AdamW's step of values."""
    return -lr * (first / correction1 / (tl.sqrt(second / correction2) + eps) + decay * value)


@triton.jit
def _average(grad, first, second, mask, beta1, beta2):
    """AdamW's averages, stored and returned."""
    old = tl.load(first, mask=mask, other=0.0).to(tl.float32)
    one = old + (1 - beta1) * (grad - old)
    two = beta2 * tl.load(second, mask=mask, other=0.0).to(tl.float32) + (1 - beta2) * (grad * grad)
    tl.store(first, one.to(first.dtype.element_ty), mask=mask)
    tl.store(second, two.to(second.dtype.element_ty), mask=mask)
    return one, two


@triton.jit
def _adamw_averages(at, numbers, rows, filters, kernel_type: tl.constexpr, grad_type: tl.constexpr, bias_type: tl.constexpr, block: tl.constexpr):  # noqa: E501  # fmt: skip
    """AdamW's averages; of each filter the squared length of the step."""
    row, layer, o, count = _place(rows)
    w = _tensor(at, layer, W, tl.float32) + o * count
    grad = _tensor(at, layer, GRAD, grad_type) + o * count
    first, second = (
        _tensor(at, layer, FIRST, tl.float32) + o * count,
        _tensor(at, layer, SECOND, tl.float32) + o * count,
    )
    alpha = tl.load(_tensor(at, layer, ALPHA, tl.float32) + o)
    known = filters + row * KNOWN
    mean, rstd = tl.load(known + MEAN), tl.load(known + RSTD)
    centre, along = tl.load(known + MEAN_GRAD), tl.load(known + MEAN_ALONG)
    c, lr, decay = _number(numbers, layer, C), _number(numbers, layer, LR), _number(numbers, layer, DECAY)
    beta1, beta2, eps = _number(numbers, layer, BETA1), _number(numbers, layer, BETA2), _number(numbers, layer, EPS)
    correction1, correction2 = _number(numbers, layer, CORRECTION1), _number(numbers, layer, CORRECTION2)
    scale, slope = c * alpha * rstd, along * rstd
    k = tl.arange(0, block)
    squares = tl.zeros([block], tl.float32)
    for start in range(0, count, block):
        inside = start + k < count
        g = tl.load(grad + start + k, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(w + start + k, mask=inside, other=0.0)
        of_w = scale * (g - centre - (value - mean) * slope)
        m, v = _average(of_w, first + start + k, second + start + k, inside, beta1, beta2)
        change = tl.where(inside, _change(value, m, v, lr, decay, eps, correction1, correction2), 0.0)
        squares += change * change
    square = tl.sum(squares)
    one = tl.arange(0, 1)
    inside = one < 1
    alpha_first = _tensor(at, layer, ALPHA_FIRST, tl.float32) + o + one
    alpha_second = _tensor(at, layer, ALPHA_SECOND, tl.float32) + o + one
    m, v = _average(c * along * count, alpha_first, alpha_second, inside, beta1, beta2)
    change = _change(alpha, m, v, _number(numbers, layer, ALPHA_LR), 0.0, eps, correction1, correction2)
    square += tl.sum(change * change)
    if tl.load(at + layer * ADDRESSES + BIAS_GRAD) != 0:
        value = tl.load(_tensor(at, layer, BIAS, bias_type) + o).to(tl.float32)
        of_bias = tl.load(_tensor(at, layer, BIAS_GRAD, bias_type) + o).to(tl.float32)
        bias_first = _tensor(at, layer, BIAS_FIRST, bias_type) + o + one
        bias_second = _tensor(at, layer, BIAS_SECOND, bias_type) + o + one
        m, v = _average(of_bias, bias_first, bias_second, inside, beta1, beta2)
        lr, decay = _number(numbers, layer, BIAS_LR), _number(numbers, layer, BIAS_DECAY)
        change = _change(value, m, v, lr, decay, eps, correction1, correction2)
        square += tl.sum(change * change)
    tl.store(known + SQUARE, square)


@triton.jit
def _adamw(at, numbers, rows, filters, factors, kernel_type: tl.constexpr, grad_type: tl.constexpr, bias_type: tl.constexpr, block: tl.constexpr):  # noqa: E501  # fmt: skip
    """Every layer by AdamW, its step times its factor."""
    _, layer, o, count = _place(rows)
    w = _tensor(at, layer, W, tl.float32) + o * count
    first, second = (
        _tensor(at, layer, FIRST, tl.float32) + o * count,
        _tensor(at, layer, SECOND, tl.float32) + o * count,
    )
    c, lr, decay = _number(numbers, layer, C), _number(numbers, layer, LR), _number(numbers, layer, DECAY)
    eps, factor = _number(numbers, layer, EPS), tl.load(factors + layer)
    correction1, correction2 = _number(numbers, layer, CORRECTION1), _number(numbers, layer, CORRECTION2)
    k = tl.arange(0, block)
    for start in range(0, count, block):
        inside = start + k < count
        value = tl.load(w + start + k, mask=inside, other=0.0)
        m = tl.load(first + start + k, mask=inside, other=0.0)
        v = tl.load(second + start + k, mask=inside, other=0.0)
        change = _change(value, m, v, lr, decay, eps, correction1, correction2)
        tl.store(w + start + k, value + factor * change, mask=inside)
    alpha = _tensor(at, layer, ALPHA, tl.float32) + o
    m = tl.load(_tensor(at, layer, ALPHA_FIRST, tl.float32) + o)
    v = tl.load(_tensor(at, layer, ALPHA_SECOND, tl.float32) + o)
    value = tl.load(alpha)
    value += factor * _change(value, m, v, _number(numbers, layer, ALPHA_LR), 0.0, eps, correction1, correction2)
    tl.store(alpha, value)
    if tl.load(at + layer * ADDRESSES + BIAS_GRAD) != 0:
        bias = _tensor(at, layer, BIAS, bias_type) + o
        m = tl.load(_tensor(at, layer, BIAS_FIRST, bias_type) + o).to(tl.float32)
        v = tl.load(_tensor(at, layer, BIAS_SECOND, bias_type) + o).to(tl.float32)
        lr, decay = _number(numbers, layer, BIAS_LR), _number(numbers, layer, BIAS_DECAY)
        moved = tl.load(bias).to(tl.float32)
        moved += factor * _change(moved, m, v, lr, decay, eps, correction1, correction2)
        tl.store(bias, moved.to(bias_type))
    kernel = _tensor(at, layer, KERNEL, kernel_type) + o * count
    tl.debug_barrier()  # what other threads of the program have stored is read again
    _write(w, kernel, c * value, count, _number(numbers, layer, GAMMA), block)
