"""The CPU backend's loops, compiled by numba: a filter at a time while it is in the cache, one pass over memory each way.

A filter is read to be summed, then written. So that memory is not read and written in turn but at once, as in a copy, a thread
fetches its next filter into the cache while it writes one.

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
"""Entries from which a kernel goes to memory past the caches, which it would only empty, and without being read first."""
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
LINE: Final = 64
"""Bytes of a cache line."""
LANES: Final = LINE // 4
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


def _lanes(context: Any, builder: Any, kind: Any, array: Any, k: Any) -> Any:
    """Address of `LANES` entries of an array."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [k]), _VECTOR.as_pointer())


def _all_lanes(builder: Any, number: Any) -> Any:
    index, undefined = ir.IntType(32), ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(index, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(index, LANES), [0] * LANES))


def _fetch(builder: Any, address: Any) -> None:
    """Begin to read a cache line, which is needed soon; any address will do."""
    flags = [ir.Constant(ir.IntType(32), value) for value in (0, 3, 1)]  # to read, into every cache, data
    kind = ir.FunctionType(ir.VoidType(), [voidptr_t, *(flag.type for flag in flags)])
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", [voidptr_t], kind)
    builder.call(prefetch, [builder.bitcast(address, voidptr_t), *flags])


@intrinsic
def _forward_lanes(typing_context: Any, row: Any, out: Any, k: Any, ahead: Any, mean: Any, factor: Any) -> Any:
    """`out = (row - mean) factor` for the entries from k on, past the caches, while those `ahead` of them are fetched."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, out, k, ahead = arguments[:4]
        mean, factor = (_all_lanes(builder, number) for number in arguments[4:])
        _fetch(builder, _lanes(context, builder, signature.args[0], row, builder.add(k, ahead)))
        w = builder.load(_lanes(context, builder, signature.args[0], row, k), align=4)
        kernel = builder.fmul(builder.fsub(w, mean), factor)
        store = builder.store(kernel, _lanes(context, builder, signature.args[1], out, k), align=LINE)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(row, out, types.int64, types.int64, types.float32, types.float32), code


@intrinsic
def _backward_lanes(
    typing_context: Any, g: Any, row: Any, out: Any, k: Any, ahead: Any, factor: Any, centre: Any, mean: Any, slope: Any
) -> Any:
    """`out = factor (g - centre - (row - mean) slope)` likewise, but through the caches, where `g` is: `out` may be `g`. (Of a
    plain loop the compiler asks that they do not overlap, or it goes without vectors.)"""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        g, row, out, k, ahead = arguments[:5]
        factor, centre, mean, slope = (_all_lanes(builder, number) for number in arguments[5:])
        loaded = []
        for kind, array in ((signature.args[0], g), (signature.args[1], row)):
            _fetch(builder, _lanes(context, builder, kind, array, builder.add(k, ahead)))
            loaded.append(builder.load(_lanes(context, builder, kind, array, k), align=4))
        along = builder.fmul(builder.fsub(loaded[1], mean), slope)
        result = builder.fmul(builder.fsub(builder.fsub(loaded[0], centre), along), factor)
        builder.store(result, _lanes(context, builder, signature.args[2], out, k), align=4)
        return context.get_dummy_value()

    return types.void(g, row, out, types.int64, types.int64, *[types.float32] * 4), code


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
def _forward_row(row: Any, out: Any, streams: Any, ahead: Any, scale: Any, gamma: Any) -> Any:
    mean, variance = _moments(row)
    rstd = np.float32(1) / np.sqrt(variance + gamma)
    factor = rstd * scale
    if streams:
        for k in range(0, row.shape[0], LANES):
            _forward_lanes(row, out, k, ahead, mean, factor)
    else:
        for k in range(row.shape[0]):
            out[k] = (row[k] - mean) * factor
    return mean, rstd


@njit(fastmath=FAST)
def _backward_row(g: Any, row: Any, out: Any, ahead: Any, scale: Any, mean: Any, rstd: Any) -> Any:
    """Returns the sum of `g h`."""
    count = np.float32(row.shape[0])
    total = np.float32(0)
    product = np.float32(0)
    for k in range(row.shape[0]):
        total += g[k]
        product += g[k] * (row[k] - mean)
    factor, centre, slope = scale * rstd, total / count, product * rstd * rstd / count
    whole = row.shape[0] - row.shape[0] % LANES
    for k in range(0, whole, LANES):
        _backward_lanes(g, row, out, k, ahead, factor, centre, mean, slope)
    for k in range(whole, row.shape[0]):
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
    aligned = job.entries % LANES == 0 and job.result % LINE == 0
    return aligned and job.filters * job.entries >= STREAMED


@njit
def _ahead(o: Any, end: Any, following: Any, job: Any) -> Any:
    """How many entries on this thread's next filter is."""
    return ((o + 1 if o + 1 < end else following) - o) * job.entries


@cfunc(types.void(types.voidptr), cache=True)
def forward_part(pointer: Any) -> None:
    """A thread's share of the forward pass of a `Job`."""
    job = carray(pointer, 1, JOB)[0]
    weight_OK, kernel_OK = _rows(job.weight, job), _rows(job.result, job)
    alpha_O, mean_O, rstd_O = _per_filter(job.alpha, job), _per_filter(job.mean, job), _per_filter(job.rstd, job)
    streams, few = _streams(job), max(1, GRAIN // job.entries)
    first = _take(pointer, few)
    while first < job.filters:
        following = _take(pointer, few)
        for o in range(first, min(first + few, job.filters)):
            scale = job.c * alpha_O[o] if job.alpha != 0 else job.c
            ahead = _ahead(o, first + few, following, job)
            mean_O[o], rstd_O[o] = _forward_row(weight_OK[o], kernel_OK[o], streams, ahead, scale, job.gamma)
        first = following


@cfunc(types.void(types.voidptr), cache=True)
def backward_part(pointer: Any) -> None:
    """A thread's share of the backward pass."""
    job = carray(pointer, 1, JOB)[0]
    grad_OK, weight_OK, grad_weight_OK = _rows(job.grad, job), _rows(job.weight, job), _rows(job.result, job)
    alpha_O, mean_O, rstd_O = _per_filter(job.alpha, job), _per_filter(job.mean, job), _per_filter(job.rstd, job)
    grad_alpha_O, few = _per_filter(job.grad_alpha, job), max(1, GRAIN // job.entries)
    first = _take(pointer, few)
    while first < job.filters:
        following = _take(pointer, few)
        for o in range(first, min(first + few, job.filters)):
            scale = job.c * alpha_O[o] if job.alpha != 0 else job.c
            ahead = _ahead(o, first + few, following, job)
            product = _backward_row(grad_OK[o], weight_OK[o], grad_weight_OK[o], ahead, scale, mean_O[o], rstd_O[o])
            grad_alpha_O[o] = job.c * product
        first = following
