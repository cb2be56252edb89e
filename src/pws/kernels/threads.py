"""Machine code on torch's own threads.

After a parallel loop torch's threads spin, waiting for the next one: threads of our own would share the cores with them and
take twice as long. Where torch uses GNU's OpenMP interface (Linux), a loop of ours runs on torch's threads as its own do:
what holds for torch's operators about autograd's threads, forks and nesting holds here too. Elsewhere it runs on the calling
thread.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

Parallel = Callable[[int, int, int, int], None]


def _find() -> Parallel | None:
    try:
        # Looked up in the library's dependencies: the very OpenMP that torch uses, whatever its name.
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        function = library.GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    parallel: Parallel = function
    return parallel


_parallel = _find()
_Function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run(function: int, argument: int, threads: int) -> None:
    """Call the machine code at `function`, `void (*)(void *)`, with `argument` on each of at most `threads` threads at once."""
    if _parallel is None or threads < 2:
        _Function(function)(argument)
    else:
        _parallel(function, argument, threads, 0)
