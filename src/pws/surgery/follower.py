"""Watching a model run: every tensor gets a `Value`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode

from pws._batch import tensors_in
from pws._gain import ACTIVATIONS
from pws.surgery.running import hooked, input_of, removed_after
from pws.surgery.value import OUTPUT, UNKNOWN, Trace, Use, Value, merged

_HOOKS: Final = ("register_hook", "retain_grad", "register_post_accumulate_grad_hook")
_ASSIGNMENTS: Final = tuple(
    f"__i{name}__"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
)


class Follower(TorchFunctionMode):
    """Fills a `Trace` while it is active."""

    def __init__(self, run: Trace, is_norm: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.trace, self.is_norm = run, is_norm
        self.ran_before = {use.name for use in run.uses}
        modules = dict(run.model.named_modules())
        self.modules = {module: name for name, module in modules.items()}
        self.names = {m: n for m, n in self.modules.items() if isinstance(m, _ConvNd | nn.Linear) or is_norm(m)}
        self.writers = {m for m in self.modules if getattr(m, "inplace", False) is True and not [*m.children()]}
        # Tensors are kept alive, so that no other gets their id, or its storage theirs.
        self.values: dict[int, tuple[Tensor, Value]] = {}
        for name, parameter in run.model.named_parameters():
            self.put(parameter, Value(parameters=frozenset({name})))
        self.inside: list[nn.Module] = []
        self.writer: nn.Module | None = None
        self.norm_outputs: dict[int, str] = {}
        self.storages: dict[int, set[str]] = {}

    def put(self, tensor: Tensor, value: Value) -> None:
        """Say where a tensor comes from."""
        self.values[id(tensor)] = (tensor, value)

    def value(self, tensor: Tensor | None) -> Value:
        """Where it comes from."""
        return self.values[id(tensor)][1] if tensor is not None and id(tensor) in self.values else UNKNOWN

    def end(self, outputs: Any) -> None:
        """Take the model's outputs."""
        for tensor in tensors_in(outputs):
            self._take(OUTPUT, self.value(tensor))
            if id(tensor) in self.norm_outputs:
                self.trace.returned.add(self.norm_outputs[id(tensor)])

    def _take(self, taker: str, value: Value) -> None:
        for source in value.sources:
            self.trace.takers.setdefault(source, set()).add(taker)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """The model's modules with hooks that call this."""
        # Modules of TorchScript take no hooks of their own.
        modules = [module for module in self.modules if not isinstance(module, torch.jit.ScriptModule)]
        handles = [module.register_forward_pre_hook(self._enter, with_kwargs=True) for module in modules]
        everywhere = register_module_forward_hook(self._leave_script, with_kwargs=True)
        with removed_after([*handles, everywhere]), hooked(modules, self._leave):
            yield

    def _leave_script(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(module, torch.jit.ScriptModule) and not self._in_norm():
            self._leave_other(module, args, kwargs, output)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module in self.writers and not self.inside:
            self.writer = module
        if module in self.names and not self._in_norm():
            self._use(self.names[module], self.is_norm(module), input_of(args, kwargs))
            self.inside.append(module)

    def _in_norm(self) -> bool:
        return bool(self.inside) and self.is_norm(self.inside[-1])

    def _use(self, name: str, is_norm: bool, tensor: Tensor | None) -> None:
        value = self.value(tensor)
        if name not in self.ran_before:
            self.trace.uses.append(Use(name, is_norm, value))
        self._take(name, value)
        if tensor is not None:
            self.trace.dims[name] = tensor.dim()
        if is_norm and tensor is not None:
            self._watch(name, tensor)

    def _watch(self, norm: str, tensor: Tensor) -> None:
        self.storages.setdefault(_storage(tensor), set()).add(norm)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.writer = None if module is self.writer else self.writer
        if self.inside and module is self.inside[-1]:
            self.inside.pop()
            if self.is_norm(module):
                self._leave_norm(module, args, kwargs, output)
            else:
                self._leave_layer(module, args, kwargs, output)
        elif not self._in_norm():
            self._leave_other(module, args, kwargs, output)

    def _leave_norm(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        name, given = self.names[module], input_of(args, kwargs)
        # A norm's module may hold an activation: what follows it is as behind one.
        activation = _activation_of(module)
        steps = frozenset({"activation"} if activation else ())
        for tensor in tensors_in(output):
            before = self.value(given)
            self.put(tensor, Value(frozenset({name}), steps, activation, before.depth, selected=before.selected))
            self.norm_outputs[id(tensor)] = name
            self._watch(name, tensor)

    def _leave_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        name, given = self.names[module], input_of(args, kwargs)
        for tensor in tensors_in(output):
            self.trace.sizes[name] = tensor.numel()
            value = self.value(tensor)
            if value.sources != {name} or value.parameters:
                self.trace.foreign.add(name)
            if not value.sources & set(self.norm_outputs.values()):
                self.put(tensor, self._behind(name, given))

    def _behind(self, layer: str, *given: Tensor | None) -> Value:
        values = [self.value(tensor) for tensor in given]
        depth = max(value.depth for value in values) + 1
        return Value(frozenset({layer}), depth=depth, selected=any(value.selected for value in values))

    def _leave_other(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """What a module without parameters made in a way that can't be followed (TorchScript, a function of its own) comes
        from what it was given; but what has no gradient of inputs that have one was made of their sizes alone: anchors."""
        given = [*tensors_in((args, kwargs))]
        made_of_sizes = any(tensor.requires_grad for tensor in given)
        lost = [t for t in tensors_in(output) if not self.value(t).is_known and (t.requires_grad or not made_of_sizes)]
        if lost and next(module.parameters(), None) is None:
            self._made(type(module).__name__.lower(), given, lost)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._in_norm():
            return func(*args, **kwargs)
        given = list(tensors_in((args, kwargs)))
        name = getattr(func, "__name__", str(func))
        written = list(tensors_in(kwargs["out"])) if kwargs.get("out") is not None else []
        written = given[:1] if _writes(name, kwargs) else written
        for tensor in written:
            self._write(tensor)
        result = func(*args, **kwargs)
        if name == "__iter__":
            result = iter(made := list(result))
            results = made
        else:
            results = [*tensors_in(result), *written]
        self._look_at_readers(name, given, results)
        if self._is_own(name, given):
            for tensor in results:
                self.put(tensor, self._behind(self.names[self.inside[-1]], *given))
        else:
            self._made(name.strip("_"), given, results)
        return result

    def _is_own(self, name: str, given: list[Tensor]) -> bool:
        """Whether this is what a layer does with its weight as it is."""
        if not self.inside or not (name.startswith("conv") or name == "linear"):
            return False
        own = self.inside[-1]._parameters.get("weight")
        return any(tensor is own for tensor in given)

    def _made(self, name: str, given: list[Tensor], results: list[Tensor]) -> None:
        known = [(tensor, value) for tensor in given if (value := self.value(tensor)).is_known]
        if known:
            value = merged(name, known, self.trace.sums.append, self.trace.gates)
            for tensor in results:
                self.put(tensor, value)

    def _write(self, tensor: Tensor) -> None:
        norms = self.storages.get(_storage(tensor), set())
        if self.writer is not None and norms:
            self.trace.in_place.setdefault(self.modules[self.writer], set()).update(norms)
        else:
            self.trace.aliased |= norms

    def _look_at_readers(self, name: str, given: list[Tensor], results: list[Tensor]) -> None:
        for tensor in given:
            norm = self.norm_outputs.get(id(tensor))
            if norm is None:
                continue
            views = (r for r in results if r is not tensor and _storage(r) == _storage(tensor))
            if name in _HOOKS or any(True for _ in views):
                self.trace.aliased.add(norm)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _writes(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a function writes over its first tensor, by torch's names for such."""
    if kwargs.get("inplace") is True or name == "__setitem__" or name in _ASSIGNMENTS:
        return True
    return name.endswith("_") and not name.endswith("__") and name != "requires_grad_"


def _activation_of(module: nn.Module) -> str | None:
    """Name the activation of a norm-plus-activation module, such as timm's BatchNormAct2d."""
    child = getattr(module, "act", None)
    if not isinstance(child, nn.Module) or isinstance(child, nn.Identity):
        return None
    name = type(child).__name__.lower()
    return next((known for known in ACTIVATIONS if known.replace("_", "") == name), "relu")
