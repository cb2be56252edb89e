"""The step on CPU cores: numba's parallel loops, two for all layers of the model, three for AdamW.

The first makes the sums of each filter, the last writes `w`, its averages and the kernel, filter by filter while they are in
the cache. Layers are told to the machine code by tables: the addresses of their tensors, and numbers. The formulas are those
of `pws.kernels.reference`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from itertools import chain
from typing import Any, Final

import numba
import numpy as np
import torch
from numba import carray, njit, prange, types
from numba.core import cgutils
from numba.core.config import NUMBA_NUM_THREADS
from numba.extending import intrinsic
from torch import Tensor

from pws.kernels.layer import Layer

CHUNK: Final = 16_384
"""Entries that a thread takes at a time: they and what belongs to them stay in its cache."""
# Sums may be reordered, into vector lanes; NaN and infinity keep their meaning.
FAST: Final = {"reassoc", "contract", "arcp", "nsz"}
# A division by zero is infinity, as in torch: as an error of Python it would leave loops in their midst, on threads that nobody
# asks for it.
compiled: Final = functools.partial(njit, error_model="numpy")

# Columns of the table of addresses (0 for a tensor that is not there) ...
GRAD, W, KERNEL, ALPHA, BIAS, BIAS_GRAD, FIRST, SECOND, ALPHA_FIRST, ALPHA_SECOND, BIAS_FIRST, BIAS_SECOND = range(12)
# ... of that of whole numbers: filters, entries of one, number of the first filter in the model ...
FILTERS, ENTRIES, OFFSET = range(3)
# ... of that of numbers: the layer's, then SGD's or AdamW's ...
C, GAMMA, PEAK, ALPHA_PEAK, BIAS_PEAK, LR, ALPHA_LR, BIAS_LR, DECAY, BIAS_DECAY = range(10)
MOMENTUM, NESTEROV = 10, 11
BETA1, BETA2, EPS, CORRECTION1, CORRECTION2 = range(10, 15)
# ... and of what is known of a filter.
MEAN, RSTD, MEAN_GRAD, MEAN_ALONG, SQUARE = range(5)

_lock = threading.Lock()
"""Numba's threads serve one caller at a time."""


class CpuStep:
    """See `pws.kernels.choose.Step`: float32 on the CPU."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self._at = np.array([_addresses(layer) for layer in layers], np.int64)
        counts = np.array([(len(layer.w), layer.fan_in, 0) for layer in layers], np.int64)
        counts[1:, OFFSET] = counts[:-1, FILTERS].cumsum()
        self._counts = counts
        self._numbers = np.zeros((len(layers), CORRECTION2 + 1), np.float32)
        self._chunks = _chunks(counts)
        self._filters = np.empty((int(counts[:, FILTERS].sum()), SQUARE + 1), np.float32)

    @staticmethod
    def serves(layer: Layer) -> bool:
        """Whether all of it is float32 on the CPU, and it has a filter: a process may hold none of a sharded layer."""
        tensors = (layer.kernel, layer.w, layer.bias)
        there = all(t is None or (t.device.type == "cpu" and t.dtype == torch.float32) for t in tensors)
        return there and layer.grad_dtype == torch.float32 and layer.alpha.numel() > 0

    def squares(self) -> Tensor:
        """See `Step`."""
        self._begin()
        self._run(_sums, self._filters)
        return self._by_layer()

    def bounded_sgd(self, bound: float | None) -> bool:
        """`squares`, the factors of a bound and `sgd` in one call; false if a gradient is not finite, and nothing has moved."""
        self._begin()
        return bool(self._run(_bounded_sgd, self._filters, np.float32(np.inf if bound is None else bound)))

    def _begin(self) -> None:
        """Tell the tables of this step's gradients and rates."""
        self._at[:, GRAD] = [_address(layer.grad) for layer in self.layers]
        self._at[:, BIAS_GRAD] = [_address(layer.bias_grad) for layer in self.layers]
        numbers = [(layer.c, layer.gamma, *layer.peaks, *layer.rates) for layer in self.layers]
        self._numbers[:, : len(numbers[0])] = numbers

    def sgd(self, factors: Tensor) -> None:
        """See `Step`."""
        self._run(_sgd, self._filters, factors.numpy())

    def adamw_squares(self) -> Tensor:
        """See `Step`."""
        self._run(_adamw_averages, self._filters)
        return self._by_layer()

    def adamw(self, factors: Tensor) -> None:
        """See `Step`."""
        self._run(_adamw, factors.numpy())

    def _by_layer(self) -> Tensor:
        starts = self._counts[:, OFFSET]
        return torch.from_numpy(np.add.reduceat(self._filters[:, SQUARE], starts, dtype=np.float32))

    def _run(self, loop: Any, *more: Any) -> Any:
        threads = torch.get_num_threads()
        with _lock:
            before, wanted = numba.get_num_threads(), min(threads, NUMBA_NUM_THREADS)
            if wanted != before:
                numba.set_num_threads(wanted)
            try:
                return loop(self._at, self._counts, self._numbers, self._chunks, *more)
            finally:
                if wanted != before:
                    numba.set_num_threads(before)
                if (
                    torch.get_num_threads() != threads
                ):  # numba's first launch sets it for all of OpenMP, torch's part too
                    torch.set_num_threads(threads)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _addresses(layer: Layer) -> list[int]:
    averages = [[*of, None, None][:2] for of in (layer.moments, layer.alpha_moments, layer.bias_moments)]
    tensors = [None, layer.w, layer.kernel, layer.alpha, layer.bias, None, *chain.from_iterable(averages)]
    return [_address(tensor) for tensor in tensors]


def _chunks(counts: Any) -> Any:
    """Layer, first filter and the one behind the last, of each portion of work."""
    found = []
    for number, (filters, entries, _) in enumerate(counts.tolist()):
        few = max(1, CHUNK // entries)
        found += [(number, first, min(first + few, filters)) for first in range(0, filters, few)]
    return np.array(found, np.int64).reshape(-1, 3)


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    """A whole number as the pointer that `carray` takes."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), code


@compiled(inline="always")
def _rows(at: Any, counts: Any) -> Any:
    """A layer's tensor `(O, K)`."""
    return carray(_pointer(at), (counts[FILTERS], counts[ENTRIES]), np.float32)


@compiled(inline="always")
def _column(at: Any, counts: Any) -> Any:
    """A layer's tensor `(O,)`."""
    return carray(_pointer(at), counts[FILTERS], np.float32)


@compiled(fastmath=FAST)
def _statistics(row: Any, total: Any, squares: Any, gamma: Any) -> Any:
    """Mean and `1 / sqrt(v + gamma)` of a filter from its sums. Means are about 0, for no step moves them; where one is larger
    than the deviation, sums would lose digits, and the filter is read again."""
    count = np.float32(row.shape[0])
    mean = total / count
    variance = squares / count - mean * mean
    if mean * mean > variance:
        squares = np.float32(0)
        for k in range(row.shape[0]):
            squares += (row[k] - mean) * (row[k] - mean)
        variance = squares / count
    return mean, np.float32(1) / np.sqrt(variance + gamma)


@compiled(fastmath=FAST)
def _write(row: Any, kernel: Any, total: Any, squares: Any, scale: Any, gamma: Any) -> None:
    """The kernel of a filter, from the filter and its sums."""
    mean, rstd = _statistics(row, total, squares, gamma)
    factor = scale * rstd
    for k in range(row.shape[0]):
        kernel[k] = (row[k] - mean) * factor


@compiled(fastmath=FAST)
def _all_sums(row: Any, grad: Any) -> Any:
    """`sum w`, `sum w^2`, `sum G`, `sum G^2` and `sum G w`, in one loop, so that memory is read all the time."""
    total, squares = np.float32(0), np.float32(0)
    of_grad, grad_squares, products = np.float32(0), np.float32(0), np.float32(0)
    for k in range(row.shape[0]):
        w, g = row[k], grad[k]
        total += w
        squares += w * w
        of_grad += g
        grad_squares += g * g
        products += g * w
    return total, squares, of_grad, grad_squares, products


@compiled(parallel=True, cache=True, fastmath=FAST)
def _sums(at: Any, counts: Any, numbers: Any, chunks: Any, filters: Any) -> None:
    """Write for each filter: statistics, sums, and the squared length of its gradient step."""
    for i in prange(chunks.shape[0]):
        layer, first, end = chunks[i]
        a, n, x = at[layer], counts[layer], numbers[layer]
        w_OK, grad_OK, alpha_O = _rows(a[W], n), _rows(a[GRAD], n), _column(a[ALPHA], n)
        count = np.float32(n[ENTRIES])
        for o in range(first, end):
            total, squares, of_grad, grad_squares, products = _all_sums(w_OK[o], grad_OK[o])
            mean, rstd = _statistics(w_OK[o], total, squares, x[GAMMA])
            along = (products - mean * of_grad) * rstd
            # sum h^2 / n = v r^2 = 1 - gamma r^2
            rest = grad_squares - of_grad * of_grad / count - along * along / count * (1 + x[GAMMA] * rstd * rstd)
            if rest < 0:  # by rounding; NaN stays
                rest = np.float32(0)
            step, of_alpha = x[PEAK] * x[C] * alpha_O[o] * rstd, x[ALPHA_PEAK] * x[C] * along
            square = step * step * rest + of_alpha * of_alpha
            if a[BIAS_GRAD] != 0:
                of_bias = x[BIAS_PEAK] * _column(a[BIAS_GRAD], n)[o]
                square += of_bias * of_bias
            row = filters[n[OFFSET] + o]
            row[MEAN], row[RSTD], row[MEAN_GRAD], row[MEAN_ALONG] = mean, rstd, of_grad / count, along / count
            row[SQUARE] = square


@compiled(fastmath=FAST)
def _sgd_row(w: Any, grad: Any, buffer: Any, row: Any, scale: Any, x: Any) -> Any:
    """`w` and its momentum by the gradient `scale (G - mean(G) - h mean(G h))`; the sums of the new `w`."""
    mean, centre, slope = row[MEAN], row[MEAN_GRAD], row[MEAN_ALONG] * row[RSTD]
    lr, decay, momentum = x[LR], x[DECAY], x[MOMENTUM]
    total, squares = np.float32(0), np.float32(0)
    if momentum == 0:
        for k in range(w.shape[0]):
            new = w[k] - lr * (scale * (grad[k] - centre - (w[k] - mean) * slope) + decay * w[k])
            w[k] = new
            total += new
            squares += new * new
    else:
        # Nesterov's step is the gradient and momentum times the new buffer, else it is the new buffer.
        of_step, of_moved = (np.float32(1), momentum) if x[NESTEROV] != 0 else (np.float32(0), np.float32(1))
        for k in range(w.shape[0]):
            step = scale * (grad[k] - centre - (w[k] - mean) * slope) + decay * w[k]
            moved = momentum * buffer[k] + step
            buffer[k] = moved
            new = w[k] - lr * (of_step * step + of_moved * moved)
            w[k] = new
            total += new
            squares += new * new
    return total, squares


@compiled(fastmath=FAST)
def _sgd_scalar(value: Any, grad: Any, buffer_O: Any, o: Any, lr: Any, decay: Any, x: Any) -> Any:
    """One number by SGD."""
    step = grad + decay * value
    if x[MOMENTUM] != 0:
        buffer_O[o] = x[MOMENTUM] * buffer_O[o] + step
        step = step + x[MOMENTUM] * buffer_O[o] if x[NESTEROV] != 0 else buffer_O[o]
    return value - lr * step


@compiled(parallel=True, cache=True, fastmath=FAST)
def _sgd(at: Any, counts: Any, numbers: Any, chunks: Any, filters: Any, factors: Any) -> None:
    """Every layer by SGD, its gradients times its factor."""
    for i in prange(chunks.shape[0]):
        layer, first, end = chunks[i]
        a, n, x, factor = at[layer], counts[layer], numbers[layer], factors[layer]
        w_OK, grad_OK, kernel_OK = _rows(a[W], n), _rows(a[GRAD], n), _rows(a[KERNEL], n)
        # Without momentum there is no buffer, and none is touched.
        buffer_OK = _rows(a[FIRST] if a[FIRST] != 0 else a[W], n)
        alpha_O, alpha_buffer_O = _column(a[ALPHA], n), _column(a[ALPHA_FIRST], n)
        bias_O, bias_grad_O, bias_buffer_O = _column(a[BIAS], n), _column(a[BIAS_GRAD], n), _column(a[BIAS_FIRST], n)
        for o in range(first, end):
            row = filters[n[OFFSET] + o]
            scale = factor * x[C] * alpha_O[o] * row[RSTD]
            total, squares = _sgd_row(w_OK[o], grad_OK[o], buffer_OK[o], row, scale, x)
            of_alpha = factor * x[C] * row[MEAN_ALONG] * np.float32(n[ENTRIES])
            alpha_O[o] = _sgd_scalar(alpha_O[o], of_alpha, alpha_buffer_O, o, x[ALPHA_LR], np.float32(0), x)
            if a[BIAS_GRAD] != 0:
                of_bias = factor * bias_grad_O[o]
                bias_O[o] = _sgd_scalar(bias_O[o], of_bias, bias_buffer_O, o, x[BIAS_LR], x[BIAS_DECAY], x)
            _write(w_OK[o], kernel_OK[o], total, squares, x[C] * alpha_O[o], x[GAMMA])


@compiled(cache=True)
def _bounded_sgd(at: Any, counts: Any, numbers: Any, chunks: Any, filters: Any, bound: Any) -> Any:
    """`_sums`, each layer's factor, and `_sgd`; false before anything moves if a gradient is not finite."""
    _sums(at, counts, numbers, chunks, filters)
    factors = np.ones(counts.shape[0], np.float32)
    for layer in range(counts.shape[0]):
        square = np.float32(0)
        for row in range(counts[layer, OFFSET], counts[layer, OFFSET] + counts[layer, FILTERS]):
            square += filters[row, SQUARE]
        if not np.isfinite(square):
            return False
        if square > bound * bound:
            factors[layer] = bound / np.sqrt(square)
    _sgd(at, counts, numbers, chunks, filters, factors)
    return True


@compiled(fastmath=FAST)
def _averages_row(w: Any, grad: Any, first: Any, second: Any, row: Any, scale: Any, x: Any) -> Any:
    """AdamW's averages of a filter; the squared length of its step."""
    mean, centre, slope = row[MEAN], row[MEAN_GRAD], row[MEAN_ALONG] * row[RSTD]
    square = np.float32(0)
    for k in range(w.shape[0]):
        g = scale * (grad[k] - centre - (w[k] - mean) * slope)
        first[k] += (1 - x[BETA1]) * (g - first[k])
        second[k] = x[BETA2] * second[k] + (1 - x[BETA2]) * (g * g)
        change = _change(w[k], first[k], second[k], x[LR], x[DECAY], x)
        square += change * change
    return square


@compiled(inline="always")
def _change(value: Any, first: Any, second: Any, lr: Any, decay: Any, x: Any) -> Any:
    """AdamW's step of one number."""
    return -lr * (first / x[CORRECTION1] / (np.sqrt(second / x[CORRECTION2]) + x[EPS]) + decay * value)


@compiled(fastmath=FAST)
def _averages_scalar(value: Any, grad: Any, first_O: Any, second_O: Any, o: Any, lr: Any, decay: Any, x: Any) -> Any:
    first_O[o] += (1 - x[BETA1]) * (grad - first_O[o])
    second_O[o] = x[BETA2] * second_O[o] + (1 - x[BETA2]) * (grad * grad)
    change = _change(value, first_O[o], second_O[o], lr, decay, x)
    return change * change


@compiled(parallel=True, cache=True, fastmath=FAST)
def _adamw_averages(at: Any, counts: Any, numbers: Any, chunks: Any, filters: Any) -> None:
    """AdamW's averages; of each filter the squared length of the step."""
    for i in prange(chunks.shape[0]):
        layer, first, end = chunks[i]
        a, n, x = at[layer], counts[layer], numbers[layer]
        w_OK, grad_OK, first_OK, second_OK = _rows(a[W], n), _rows(a[GRAD], n), _rows(a[FIRST], n), _rows(a[SECOND], n)
        alpha_O = _column(a[ALPHA], n)
        alpha_first_O, alpha_second_O = _column(a[ALPHA_FIRST], n), _column(a[ALPHA_SECOND], n)
        bias_O, bias_grad_O = _column(a[BIAS], n), _column(a[BIAS_GRAD], n)
        bias_first_O, bias_second_O = _column(a[BIAS_FIRST], n), _column(a[BIAS_SECOND], n)
        zero = np.float32(0)
        for o in range(first, end):
            row = filters[n[OFFSET] + o]
            scale = x[C] * alpha_O[o] * row[RSTD]
            square = _averages_row(w_OK[o], grad_OK[o], first_OK[o], second_OK[o], row, scale, x)
            of_alpha = x[C] * row[MEAN_ALONG] * np.float32(n[ENTRIES])
            square += _averages_scalar(alpha_O[o], of_alpha, alpha_first_O, alpha_second_O, o, x[ALPHA_LR], zero, x)
            if a[BIAS_GRAD] != 0:
                square += _averages_scalar(
                    bias_O[o], bias_grad_O[o], bias_first_O, bias_second_O, o, x[BIAS_LR], x[BIAS_DECAY], x
                )
            row[SQUARE] = square


@compiled(parallel=True, cache=True, fastmath=FAST)
def _adamw(at: Any, counts: Any, numbers: Any, chunks: Any, factors: Any) -> None:
    """Every layer by AdamW, its step times its factor."""
    for i in prange(chunks.shape[0]):
        layer, first, end = chunks[i]
        a, n, x, factor = at[layer], counts[layer], numbers[layer], factors[layer]
        w_OK, kernel_OK, first_OK, second_OK = (
            _rows(a[W], n),
            _rows(a[KERNEL], n),
            _rows(a[FIRST], n),
            _rows(a[SECOND], n),
        )
        alpha_O = _column(a[ALPHA], n)
        alpha_first_O, alpha_second_O = _column(a[ALPHA_FIRST], n), _column(a[ALPHA_SECOND], n)
        bias_O, bias_first_O, bias_second_O = _column(a[BIAS], n), _column(a[BIAS_FIRST], n), _column(a[BIAS_SECOND], n)
        zero = np.float32(0)
        for o in range(first, end):
            w = w_OK[o]
            total, squares = zero, zero
            for k in range(w.shape[0]):
                new = w[k] + factor * _change(w[k], first_OK[o, k], second_OK[o, k], x[LR], x[DECAY], x)
                w[k] = new
                total += new
                squares += new * new
            alpha_O[o] += factor * _change(alpha_O[o], alpha_first_O[o], alpha_second_O[o], x[ALPHA_LR], zero, x)
            if a[BIAS_GRAD] != 0:
                bias_O[o] += factor * _change(
                    bias_O[o], bias_first_O[o], bias_second_O[o], x[BIAS_LR], x[BIAS_DECAY], x
                )
            _write(w, kernel_OK[o], total, squares, x[C] * alpha_O[o], x[GAMMA])
