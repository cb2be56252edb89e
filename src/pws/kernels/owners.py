"""Who holds a gradient that autograd hands to a backward pass.

Nearly always nobody else: the convolution made it for us, and it is let go of afterwards. Then the weight's gradient can be
written over it, which saves the memory, its page faults and a trip past the caches. A hook, `retain_grad`, a second consumer
or the caller may hold it too; each of them raises a count.
"""

from __future__ import annotations

import sys
from typing import Any, Final

import torch
from torch import Tensor

Counts = tuple[int, int, int]


def owners(tensor: Tensor) -> Counts:
    """References to the tensor in C++, to its Python object, and to its storage."""
    storage: Any = tensor.untyped_storage()
    return tensor._use_count(), sys.getrefcount(tensor), torch._C._storage_Use_Count(storage._cdata)


class _Trial(torch.autograd.Function):
    """Counts the owners of its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, seen: list[Counts]) -> Tensor:
        ctx.seen = seen
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.seen.append(owners(grad))
        return grad, None


def _sole() -> Counts | None:
    if not hasattr(Tensor, "_use_count"):
        return None
    seen: list[Counts] = []
    with torch.inference_mode(False), torch.enable_grad():
        tensor = torch.ones(2, requires_grad=True, device="cpu")
        output: Tensor = _Trial.apply(tensor, seen)
        torch.autograd.backward((output * output.detach()).sum())
    return seen[0]


SOLE: Final = _sole()
"""What `owners` gives, called in a backward pass, for a gradient that nobody else holds; None if this torch does not count."""
