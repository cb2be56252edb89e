"""Autocast's cache of weights in half precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fresh_casts() -> Iterator[None]:
    """Run without the cache, and leave it empty; also a decorator, `@fresh_casts()`.

    The cache knows a weight by its identity alone. So whatever writes to weights, or runs without gradient what is later run
    with one, would have autocast go on with the copy from before: everything of ours that does either runs in here.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
        torch.clear_autocast_cache()
