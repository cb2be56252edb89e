"""What a model does with one example, by running it: what each layer and norm was given, and where tensors were added.

Nothing is read from names or from the order of `named_modules`: a tensor is followed from the layer that made it through every
function of torch until a layer or norm takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedBuffer
from torch.overrides import TorchFunctionMode

from pws.diagnosis.batch import REJECTIONS, batch_of, check_finite, tensors_in
from pws.errors import PwsError, one_line
from pws.gain import ACTIVATIONS
from pws.surgery.copying import copy_of

INPUT: Final = ""
"""The source of the model's input; layers and norms are sources by their names."""
OUTPUT: Final = "output"
"""What takes the model's output."""
_SUMS: Final = ("add", "sub", "rsub")
_JOINS: Final = ("cat", "concat", "concatenate", "stack", "hstack")
_PRODUCTS: Final = ("mul", "multiply", "matmul", "bmm", "einsum", "baddbmm")
_NOTHING: Final = ("clone", "contiguous", "detach", "dropout", "to", "float", "type")


@dataclass(frozen=True)
class Value:
    """Where a tensor comes from."""

    sources: frozenset[str]
    """The layers, norms or input that it was made of without another layer or norm between."""
    steps: frozenset[str] = frozenset()
    """What was done since: "activation", "sum", "join", "product", "other"."""
    activation: str | None = None
    """The last activation since, by its name in torch.nn.functional."""
    depth: int = 0
    """Weight layers on the longest way to it."""


@dataclass(frozen=True)
class Use:
    """One call of a layer or norm."""

    name: str
    is_norm: bool
    input: Value


@dataclass(frozen=True)
class Sum:
    """An addition of tensors that come from different sources."""

    operands: tuple[Value, ...]


@dataclass
class Trace:
    """One run of a model."""

    model: nn.Module
    """The copy that ran: its lazy layers have their shapes."""
    uses: list[Use] = field(default_factory=list)
    """In the order of execution."""
    sums: list[Sum] = field(default_factory=list)
    gates: set[str] = field(default_factory=set)
    """Sources that only scale another tensor."""
    takers: dict[str, set[str]] = field(default_factory=dict)
    """Source to what took it: names of layers and norms, `OUTPUT`."""
    dims: dict[str, int] = field(default_factory=dict)
    """Of the inputs of layers and norms."""
    foreign: set[str] = field(default_factory=set)
    """Layers that did not convolve with their own weight."""
    in_place: dict[str, set[str]] = field(default_factory=dict)
    """Modules, such as ReLU(inplace=True), to the norms whose output they wrote over."""
    overwritten: set[str] = field(default_factory=set)
    """Norms whose output a function wrote over: without the norm it would write over the norm's input."""


def trace(model: nn.Module, example: Any, is_norm: Callable[[nn.Module], bool]) -> Trace:
    """Run a copy of `model` on `example` in train mode, where all its branches run, its norms in eval mode, where any batch
    size does; the model itself and the random state are left alone.

    Raises:
        PwsError: the model can't be run on the example.
    """
    # Buffers of lazy modules have no copy of their own.
    lazy = [buffer for buffer in model.buffers() if isinstance(buffer, UninitializedBuffer)]
    memo = {id(b): UninitializedBuffer(device=b.device, dtype=b.dtype) for b in lazy}  # type: ignore[call-arg]
    copy = copy_of(model, memo).train()
    for module in copy.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    follower = _Follower(copy, is_norm)
    batch = batch_of((example,))
    check_finite(batch.inputs, "input")
    with torch.random.fork_rng(), torch.no_grad(), follower.hooks(), follower:
        for tensor in tensors_in(batch.inputs):
            follower.put(tensor, Value(frozenset({INPUT})))
        try:
            outputs = batch.outputs(copy)
        except REJECTIONS as error:
            raise PwsError(
                f"{type(model).__name__} can't be run on the example: {type(error).__name__}: {one_line(error)}. Give what its "
                "forward takes: a tensor, or a tuple of all its arguments, of a size and device that the model takes."
            ) from error
    for tensor in tensors_in(outputs):
        follower.take(OUTPUT, follower.value(tensor))
    return follower.trace


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor that a layer is called with, by position or by name."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


class _Follower(TorchFunctionMode):
    """Keeps a `Value` for every tensor."""

    def __init__(self, model: nn.Module, is_norm: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.trace = Trace(model)
        self.names: dict[nn.Module, str] = {}
        for name, module in model.named_modules():
            if isinstance(module, _ConvNd | nn.Linear) or is_norm(module):
                self.names[module] = name
        self.is_norm = is_norm
        # Tensors are kept alive, so that no other gets their id.
        self.values: dict[int, tuple[Tensor, Value]] = {}
        self.inside: list[nn.Module] = []
        self.used_own_weight = False
        self.writers = {
            module: name for name, module in model.named_modules() if getattr(module, "inplace", False) is True
        }
        self.writing = False
        self.norms_run: set[str] = set()

    def put(self, tensor: Tensor, value: Value) -> None:
        self.values[id(tensor)] = (tensor, value)

    def value(self, tensor: Tensor) -> Value:
        return self.values[id(tensor)][1] if id(tensor) in self.values else Value(frozenset())

    def take(self, taker: str, value: Value) -> None:
        for source in value.sources:
            self.trace.takers.setdefault(source, set()).add(taker)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = []
        for module in self.names:
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave, with_kwargs=True))
        for module in self.writers:
            handles.append(module.register_forward_pre_hook(self._write, with_kwargs=True))
            handles.append(module.register_forward_hook(self._wrote))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _write(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.inside:
            self.writing = True
            norm = self._norm_of(input_of(args, kwargs))
            if norm:
                self.trace.in_place.setdefault(self.writers[module], set()).add(norm)

    def _wrote(self, *_: Any) -> None:
        self.writing = False

    def _norm_of(self, tensor: Tensor) -> str | None:
        """The norm whose output this is, nothing between."""
        value = self.value(tensor)
        name = next(iter(value.sources), INPUT)
        return name if len(value.sources) == 1 and not value.steps and name in self.norms_run else None

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensor = input_of(args, kwargs)
        self.inside.append(module)
        self.used_own_weight = False
        name, value = self.names[module], self.value(tensor)
        self.trace.uses.append(Use(name, self.is_norm(module), value))
        self.trace.dims[name] = tensor.dim()
        self.take(name, value)
        if self.is_norm(module):
            self.norms_run.add(name)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        self.inside.pop()
        layer = not self.is_norm(module)
        if layer and not self.used_own_weight:
            self.trace.foreign.add(self.names[module])
        # A norm's module may hold an activation: what follows it is as behind one.
        activation = None if layer else _activation_of(module)
        steps = frozenset({"activation"} if activation else ())
        depth = self.value(input_of(args, kwargs)).depth + layer
        self.put(output, Value(frozenset({self.names[module]}), steps, activation, depth))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = list(tensors_in((args, kwargs or {})))
        if not self.inside and func.__name__ != "__get__":
            self._look_at_writing(func.__name__, given, kwargs or {})
        result = func(*args, **(kwargs or {}))
        if self.inside:
            own = self.inside[-1]._parameters.get("weight")
            is_operation = func.__name__.startswith("conv") or func.__name__ == "linear"
            self.used_own_weight |= is_operation and any(tensor is own for tensor in given)
            return result
        known = [(tensor, self.value(tensor)) for tensor in given if id(tensor) in self.values]
        if known:
            value = self._merged(func.__name__.strip("_"), known)
            for tensor in tensors_in(result):
                self.put(tensor, value)
        return result

    def _look_at_writing(self, name: str, given: list[Tensor], kwargs: dict[str, Any]) -> None:
        writes = (
            kwargs.get("inplace") is True or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
        )
        if writes and not self.writing and given and (norm := self._norm_of(given[0])):
            self.trace.overwritten.add(norm)

    def _merged(self, name: str, known: list[tuple[Tensor, Value]]) -> Value:
        values = list(dict.fromkeys(value for _, value in known))
        steps = frozenset[str]().union(*(value.steps for value in values))
        depth = max(value.depth for value in values)
        sources = frozenset[str]().union(*(value.sources for value in values))
        operation = name.removeprefix("r").removeprefix("i") if name not in ACTIVATIONS else name
        if operation in _SUMS and len(values) > 1:
            self.trace.sums.append(Sum(tuple(values)))
            return Value(sources, steps | {"sum"}, None, depth)
        if operation in _JOINS:
            return Value(sources, steps | {"join"}, None, depth)
        if operation in _PRODUCTS and len(values) > 1:
            large = max(known, key=lambda pair: pair[0].numel())
            for tensor, value in known:
                if tensor.numel() < large[0].numel():
                    self.trace.gates |= value.sources - large[1].sources
                    sources = sources - (value.sources - large[1].sources)
            return Value(sources, steps | {"product"}, large[1].activation, depth)
        activation = next((value.activation for value in values if value.activation), None)
        if name in ACTIVATIONS:
            return Value(sources, steps | {"activation"}, name, depth)
        return Value(sources, steps if name in _NOTHING else steps | {"other"}, activation, depth)


def _activation_of(module: nn.Module) -> str | None:
    """Of a norm-plus-activation module, such as timm's BatchNormAct2d."""
    child = getattr(module, "act", None)
    if not isinstance(child, nn.Module) or isinstance(child, nn.Identity):
        return None
    name = type(child).__name__.lower()
    return next((known for known in ACTIVATIONS if known.replace("_", "") == name), "relu")
