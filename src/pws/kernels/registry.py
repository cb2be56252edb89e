"""Which backend serves a weight."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from pws.errors import PwsError, UnknownNameError
from pws.kernels.aten import ATEN
from pws.kernels.backend import Backend

BACKENDS: Final = MappingProxyType(
    {"aten": "pws.kernels.aten", "cpu": "pws.kernels.cpu", "triton": "pws.kernels.triton"}
)
"""Name to module; the last two need numba and triton, and are imported when they are first asked for."""
_AUTOMATIC: Final = MappingProxyType({"cpu": "cpu", "cuda": "triton"})
"""Device to the backend that is fastest there."""

_chosen: Backend | None = None
_loaded: dict[str, Backend | ImportError] = {}


@contextmanager
def use(name: str | None) -> Iterator[None]:
    """Standardize with the backend called `name` inside a `with`; None chooses by device and dtype, as is the default.

        with pws.kernels.use("aten"):
            model(images)

    It holds for all threads: backward passes run in threads of their own.

    Raises:
        UnknownNameError: no such backend.
        PwsError: what the backend needs is not installed; inside the `with`, a weight that it can't serve.
    """
    global _chosen
    before = _chosen
    _chosen = None if name is None else load(name)
    try:
        yield
    finally:
        _chosen = before


def chosen() -> str | None:
    """What `use` says."""
    return None if _chosen is None else _chosen.name


def load(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        UnknownNameError: no such backend.
        PwsError: what it needs is not installed.
    """
    if name not in BACKENDS:
        raise UnknownNameError("kernel backend", name, BACKENDS)
    found = _load(name)
    if isinstance(found, ImportError):
        raise PwsError(f"the kernel backend {name} can't be imported: {found}. pip install 'pws-torch[kernels]'.")
    return found


def choose(weight_OK: Tensor) -> Backend:
    """The backend for this weight: what `use` says, else the device's own where that is installed and serves, else aten."""
    if _chosen is not None:
        refusal = _chosen.refusal(weight_OK)
        if refusal is not None:
            raise PwsError(f"the kernel backend {_chosen.name} was asked for, but {refusal}. Leave the choice to pws.")
        return _chosen
    found = _load(_AUTOMATIC.get(weight_OK.device.type, "aten"))
    return ATEN if isinstance(found, ImportError) or found.refusal(weight_OK) is not None else found


def _load(name: str) -> Backend | ImportError:
    if name not in _loaded:
        try:
            _loaded[name] = getattr(importlib.import_module(BACKENDS[name]), name.upper())
        except ImportError as error:
            _loaded[name] = error
    return _loaded[name]


def traced_operators() -> Any:
    """The module `pws.kernels.traced`; None where no GPU or no triton is there to run them, or a torch that would put them into
    CUDA graphs."""
    there = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    if not there or not hasattr(torch.Tag, "cudagraph_unsafe") or isinstance(_load("triton"), ImportError):
        return None
    return importlib.import_module("pws.kernels.traced")


def installed() -> list[str]:
    """The names of the backends that can be imported here; triton's runs where there is a GPU."""
    return [name for name in BACKENDS if not isinstance(_load(name), ImportError)]


def empty_cache() -> None:
    """Give memory that the CPU's backend keeps for kernels and gradients to come, and no tensor uses, back to the system, as
    `torch.cuda.empty_cache` does for GPUs. It is as much as a training step uses, and the next step takes it anew."""
    if "cpu" in installed():
        importlib.import_module("pws.kernels.buffers").empty_cache()
