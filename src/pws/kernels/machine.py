"""The CPU backend's loops, compiled by numba: a filter at a time while it is in the cache, one pass over memory each way.

Each thread that calls `forward_part` or `backward_part` takes the next few filters until none is left. A filter is always
summed by one thread, so results do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core.cgutils import voidptr_t
from numba.extending import intrinsic

GRAIN: Final = 16_384
"""Entries that a thread takes at a time: handing them out costs little beside their pass, and they fit the cache."""
HEAD: Final = 8
"""Entries whose mean is the first guess at a filter's mean."""
STREAMED: Final = 131_072
"""Entries from which a result goes to memory past the caches, which it would only empty, and without being read first."""
# Sums may be reordered, into vector lanes; NaN and infinity keep their meaning.
FAST: Final = {"reassoc", "contract", "arcp", "nsz"}


class Job(ctypes.Structure):
    """What the machine code is told."""

    _fields_ = (
        ("taken", ctypes.c_int64),  # filters, so far
        ("filters", ctypes.c_int64),
        ("entries", ctypes.c_int64),
        ("c", ctypes.c_float),
        ("gamma", ctypes.c_float),
        # Addresses, 0 for an alpha that is not there.
        ("weight", ctypes.c_int64),
        ("alpha", ctypes.c_int64),
        ("mean", ctypes.c_int64),
        ("rstd", ctypes.c_int64),
        ("result", ctypes.c_int64),
        ("grad", ctypes.c_int64),
        ("grad_alpha", ctypes.c_int64),
    )


JOB: Final = np.dtype(Job)
LANES: Final = 8
_VECTOR: Final = ir.VectorType(ir.FloatType(), LANES)


@intrinsic
def _take(typing_context: Any, job: Any, count: Any) -> Any:
    """Add to the job's first field, whole: what it was before."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        field = builder.bitcast(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", field, arguments[1], "monotonic")

    return types.int64(types.voidptr, types.int64), code


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], voidptr_t)

    return types.voidptr(types.int64), code


@intrinsic
def _stream_lanes(typing_context: Any, source: Any, target: Any, k: Any) -> Any:
    """`target[k : k + LANES] = source[k : k + LANES]` without reading the target's cache line first."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        places = []
        for kind, array in zip(signature.args[:2], arguments[:2], strict=True):
            data = context.make_array(kind)(context, builder, array).data
            places.append(builder.bitcast(builder.gep(data, [arguments[2]]), _VECTOR.as_pointer()))
        store = builder.store(builder.load(places[0], align=4), places[1], align=4 * LANES)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(source, target, types.int64), code


@njit(fastmath=FAST)
def _sums(row: Any, centre: Any) -> Any:
    """Of the entries less `centre`, and of their squares."""
    total = np.float32(0)
    squares = np.float32(0)
    for k in range(row.shape[0]):
        centred = row[k] - centre
        total += centred
        squares += centred * centred
    return total, squares


@njit(fastmath=FAST)
def _moments(row: Any) -> Any:
    """Mean and biased variance, in one pass about a guess at the mean."""
    count = np.float32(row.shape[0])
    head = min(row.shape[0], HEAD)
    mean = np.float32(0)
    for k in range(head):
        mean += row[k]
    mean /= np.float32(head)
    total, squares = _sums(row, mean)
    off = total / count
    variance = squares / count - off * off
    mean += off
    if off * off > variance:  # a bad guess: the variance was a small difference of large numbers
        total, squares = _sums(row, mean)
        off = total / count
        variance = max(squares / count - off * off, np.float32(0))
        mean += off
    return mean, variance


@njit(fastmath=FAST)
def _forward_row(row: Any, out: Any, scale: Any, gamma: Any) -> Any:
    mean, variance = _moments(row)
    rstd = np.float32(1) / np.sqrt(variance + gamma)
    factor = rstd * scale
    for k in range(row.shape[0]):
        out[k] = (row[k] - mean) * factor
    return mean, rstd


@njit(fastmath=FAST)
def _backward_row(g: Any, row: Any, out: Any, scale: Any, mean: Any, rstd: Any) -> Any:
    """Returns the sum of `g h`."""
    count = np.float32(row.shape[0])
    total = np.float32(0)
    product = np.float32(0)
    for k in range(row.shape[0]):
        total += g[k]
        product += g[k] * (row[k] - mean)
    factor, centre, slope = scale * rstd, total / count, product * rstd * rstd / count
    for k in range(row.shape[0]):
        out[k] = factor * (g[k] - centre - (row[k] - mean) * slope)
    return product * rstd


@njit
def _rows(address: Any, job: Any) -> Any:
    return carray(_pointer(address), (job.filters, job.entries), np.float32)


@njit
def _per_filter(address: Any, job: Any) -> Any:
    return carray(_pointer(address), job.filters, np.float32)


@njit
def _streams(job: Any) -> Any:
    whole = job.entries % LANES == 0 and job.result % (4 * LANES) == 0
    return whole and job.filters * job.entries >= STREAMED


@njit
def _stream(source: Any, target: Any) -> None:
    for k in range(0, source.shape[0], LANES):
        _stream_lanes(source, target, k)


@njit
def _copy(source: Any, target: Any) -> None:
    for k in range(source.shape[0]):
        target[k] = source[k]


@cfunc(types.void(types.voidptr), cache=True)
def forward_part(pointer: Any) -> None:
    """A thread's share of the forward pass of a `Job`."""
    job = carray(pointer, 1, JOB)[0]
    weight_OK, kernel_OK = _rows(job.weight, job), _rows(job.result, job)
    alpha_O, mean_O, rstd_O = _per_filter(job.alpha, job), _per_filter(job.mean, job), _per_filter(job.rstd, job)
    streams, row = _streams(job), np.empty(job.entries, np.float32)
    few = max(1, GRAIN // job.entries)
    while True:
        first = _take(pointer, few)
        if first >= job.filters:
            break
        for o in range(first, min(first + few, job.filters)):
            scale = job.c * alpha_O[o] if job.alpha != 0 else job.c
            out = row if streams else kernel_OK[o]
            mean_O[o], rstd_O[o] = _forward_row(weight_OK[o], out, scale, job.gamma)
            if streams:
                _stream(row, kernel_OK[o])


@cfunc(types.void(types.voidptr), cache=True)
def backward_part(pointer: Any) -> None:
    """A thread's share of the backward pass."""
    job = carray(pointer, 1, JOB)[0]
    grad_OK, weight_OK, grad_weight_OK = _rows(job.grad, job), _rows(job.weight, job), _rows(job.result, job)
    alpha_O, mean_O, rstd_O = _per_filter(job.alpha, job), _per_filter(job.mean, job), _per_filter(job.rstd, job)
    grad_alpha_O = _per_filter(job.grad_alpha, job)
    in_place, row = job.result == job.grad, np.empty(job.entries, np.float32)
    streams = _streams(job) and not in_place
    few = max(1, GRAIN // job.entries)
    while True:
        first = _take(pointer, few)
        if first >= job.filters:
            break
        for o in range(first, min(first + few, job.filters)):
            scale = job.c * alpha_O[o] if job.alpha != 0 else job.c
            # Where source and target are one, the compiler's check for overlap would choose the loop without vectors.
            out = row if streams or in_place else grad_weight_OK[o]
            product = _backward_row(grad_OK[o], weight_OK[o], out, scale, mean_O[o], rstd_O[o])
            grad_alpha_O[o] = job.c * product
            if streams:
                _stream(row, grad_weight_OK[o])
            elif in_place:
                _copy(row, grad_weight_OK[o])
