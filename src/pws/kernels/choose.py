"""Which implementation moves which layers."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Final, Protocol

from torch import Tensor

from pws._errors import PwsError, UnknownNameError
from pws.kernels.layer import Layer


class Step(Protocol):
    """One step of some layers of one device: `squares`, then `sgd`; or `squares`, `adamw_squares`, then `adamw`."""

    def __init__(self, layers: Sequence[Layer]) -> None: ...

    @staticmethod
    def serves(layer: Layer) -> bool:
        """Whether it can move this layer."""

    def squares(self) -> Tensor:
        """The squared length of each layer's gradient step at its largest rates `(L,)`; not finite where a gradient isn't."""

    def sgd(self, factors: Tensor) -> None:
        """Move every layer by SGD, its gradients times `factors` `(L,)`."""

    def adamw_squares(self) -> Tensor:
        """Update AdamW's averages; the squared length of the step that they ask for `(L,)`."""

    def adamw(self, factors: Tensor) -> None:
        """Move every layer by AdamW, its step times `factors` `(L,)`."""


STEPS: Final = MappingProxyType(
    {
        "reference": ("pws.kernels.reference", "ReferenceStep"),
        "cpu": ("pws.kernels.cpu", "CpuStep"),
        "triton": ("pws.kernels.triton", "TritonStep"),
    }
)
"""Name to module and class. `cpu` needs numba, `triton` needs triton and a GPU."""

_chosen: str | None = None
_loaded: dict[str, Any] = {}


@contextmanager
def use(name: str | None) -> Iterator[None]:
    """Take steps with one implementation inside a `with`; None chooses by device and dtype, as is the default.

        with pws.kernels.use("reference"):
            optimizer.step()

    Raises:
        UnknownNameError: no such implementation.
        PwsError: what it needs is not installed; inside the `with`, a layer that it can't move.
    """
    global _chosen
    if name is not None and name not in STEPS:
        raise UnknownNameError("step implementation", name, STEPS)
    if name is not None and isinstance(_load(name), ImportError):
        raise PwsError(f"the step {name} can't be imported: {_load(name)}. pip install 'pws-torch[kernels]'.")
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def steps_of(layers: Sequence[Layer]) -> list[tuple[Step, list[int]]]:
    """The layers by implementation, device and dtypes: a step for each, with the numbers of its layers."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for i, layer in enumerate(layers):
        _check_memory(layer)
        bias = None if layer.bias is None else layer.bias.dtype
        kind = (layer.kernel.device, layer.kernel.dtype, layer.grad_dtype, bias)
        kinds.setdefault((_name_for(layer), *kind), []).append(i)
    return [(_load(kind[0])([layers[i] for i in numbers]), numbers) for kind, numbers in kinds.items()]


def _check_memory(layer: Layer) -> None:
    """Raise `PwsError` unless the tensors of a layer are plain ones of one device: the fused steps read their memory."""
    scales = [layer.alpha, *layer.alpha_moments, *layer.bias_moments, *([] if layer.bias is None else [layer.bias])]
    for tensor in (layer.w, *layer.moments, *scales):
        if tensor.device != layer.kernel.device:
            raise PwsError(
                f"a step moves a layer on one device; the weight {layer.name!r} is on {layer.kernel.device}, and its state "
                f"holds a tensor on {tensor.device}. Load the state by optimizer.load_state_dict, which moves it."
            )
    if any(tensor.is_neg() or not tensor.is_contiguous() for tensor in scales):
        raise PwsError(
            f"a step takes scales as memory holds them; those of {layer.name!r} are a view. Clone them first."
        )


def _name_for(layer: Layer) -> str:
    automatic = {"cpu": "cpu", "cuda": "triton"}.get(layer.kernel.device.type, "reference")
    wanted = automatic if _chosen is None else _chosen
    found = _load(wanted)
    if not isinstance(found, ImportError) and found.serves(layer):
        return wanted
    if _chosen is not None:
        raise PwsError(
            f"the step {_chosen} was asked for, and can't move {layer.name!r} of {layer.kernel.dtype} on "
            f"{layer.kernel.device}. Leave the choice to pws."
        )
    return "reference"


def _load(name: str) -> Any:
    if name not in _loaded:
        module, cls = STEPS[name]
        try:
            _loaded[name] = getattr(importlib.import_module(module), cls)
        except ImportError as error:
            _loaded[name] = error
    return _loaded[name]


def chosen() -> str | None:
    """What `use` says."""
    return _chosen


def installed() -> list[str]:
    """The names of the implementations that can be imported here; triton's runs where there is a GPU."""
    return [name for name in STEPS if not isinstance(_load(name), ImportError)]
