"""One filter in Triton, forward and backward: what the kernels of one layer and of all layers have in common.

Statistics are in float32. A filter of up to `block` entries is read once and kept in registers (`whole`); a larger one is read
again from the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward_row(weight, kernel, scale, count, gamma, block: tl.constexpr, whole: tl.constexpr):
    """`kernel = scale h`, `h = (w - m) / sqrt(v + gamma)`; returns `m` and `1 / sqrt(v + gamma)`."""
    k = tl.arange(0, block)
    if whole:
        inside = k < count
        row = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
        m = tl.sum(row) / count
        centred = tl.where(inside, row - m, 0.0)
        r = 1.0 / tl.sqrt(tl.sum(centred * centred) / count + gamma)
        tl.store(kernel + k, (centred * (r * scale)).to(kernel.dtype.element_ty), mask=inside)
    else:
        total = tl.zeros([block], tl.float32)
        for start in range(0, count, block):
            total += tl.load(weight + start + k, mask=start + k < count, other=0.0).to(tl.float32)
        m = tl.sum(total) / count
        squares = tl.zeros([block], tl.float32)
        for start in range(0, count, block):
            row = tl.load(weight + start + k, mask=start + k < count, other=0.0).to(tl.float32)
            centred = tl.where(start + k < count, row - m, 0.0)
            squares += centred * centred
        r = 1.0 / tl.sqrt(tl.sum(squares) / count + gamma)
        for start in range(0, count, block):
            row = tl.load(weight + start + k, mask=start + k < count, other=0.0).to(tl.float32)
            out = ((row - m) * (r * scale)).to(kernel.dtype.element_ty)
            tl.store(kernel + start + k, out, mask=start + k < count)
    return m, r


@triton.jit
def backward_row(grad, weight, grad_weight, scale, m, r, count, block: tl.constexpr, whole: tl.constexpr):
    """`dw = scale r (g - mean(g) - h mean(g h))`; returns `sum(g h)`."""
    k = tl.arange(0, block)
    if whole:
        inside = k < count
        g = tl.load(grad + k, mask=inside, other=0.0).to(tl.float32)
        row = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
        h = tl.where(inside, (row - m) * r, 0.0)
        along = tl.sum(g * h)
        out = scale * r * (g - tl.sum(g) / count - h * (along / count))
        tl.store(grad_weight + k, out.to(grad_weight.dtype.element_ty), mask=inside)
    else:
        totals = tl.zeros([block], tl.float32)
        products = tl.zeros([block], tl.float32)
        for start in range(0, count, block):
            inside = start + k < count
            g = tl.load(grad + start + k, mask=inside, other=0.0).to(tl.float32)
            row = tl.load(weight + start + k, mask=inside, other=0.0).to(tl.float32)
            totals += g
            products += g * (row - m) * r
        along = tl.sum(products)
        centre = tl.sum(totals) / count
        for start in range(0, count, block):
            inside = start + k < count
            g = tl.load(grad + start + k, mask=inside, other=0.0).to(tl.float32)
            row = tl.load(weight + start + k, mask=inside, other=0.0).to(tl.float32)
            out = scale * r * (g - centre - (row - m) * r * (along / count))
            tl.store(grad_weight + start + k, out.to(grad_weight.dtype.element_ty), mask=inside)
    return along
