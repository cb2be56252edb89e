"""What fits into the machine's memory: asked before the work, for the system ends what asks for too much without a word."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Final

import torch

from pws._errors import PwsError

GROUP_LIMIT: Final = Path("/sys/fs/cgroup/memory.max")


def check_memory(need: float, what: str) -> None:
    """Raise `PwsError` if `need` bytes are more than this process can have; `what` needs them begins the message."""
    have = memory_limit()
    if need > have:
        raise PwsError(
            f"{what} needs {need / 2**30:,.1f} GiB of memory; there are {have / 2**30:,.1f}. Make it smaller."
        )


def peak_memory(device: torch.device) -> int:
    """Bytes so far: on a GPU the allocator's peak, else the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # in KiB on Linux


def memory_limit() -> int:
    """Bytes: of the machine, of the container, or of the process, whichever is the least."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    if GROUP_LIMIT.is_file() and (text := GROUP_LIMIT.read_text(encoding="ascii").strip()).isdigit():
        limits.append(int(text))
    own, _ = resource.getrlimit(resource.RLIMIT_AS)
    return min(limits if own == resource.RLIM_INFINITY else [*limits, own])
