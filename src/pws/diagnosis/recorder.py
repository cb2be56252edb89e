"""Records one forward and backward pass of a model, whoever runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pws.diagnosis.moments import batched
from pws.diagnosis.operation import Call, call_of
from pws.diagnosis.record import (
    CallRecord,
    LayerRecord,
    StepMap,
    record_backward,
    record_forward,
    sum_of_squares,
    wide,
)


class Recorder:
    """The layers of `model` in execution order, with what each call did.

    `with recorder.forward():` around the forward pass collects its statistics and leaves hooks on the tensors of the
    graph, which collect those of the backward pass. Nothing stays on the model: module hooks are removed at the end of
    the forward pass, the hooks on parameters by `close`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: dict[tuple[str, int], LayerRecord] = {}
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self._names = {module: name for name, module in model.named_modules()}
        self._stack: list[tuple[nn.Module, list[int]]] = []
        self._handles: list[Any] = []
        self._followed: set[nn.Parameter] = set()
        self.on_backward_end: Callable[[], None] | None = None
        """Called when the backward pass through the recorded graph has ended, before whatever follows it."""

    @contextmanager
    def forward(self, *, running: bool = False) -> Iterator[None]:
        """Record the operations called inside, by the innermost module that is running: the model itself if `running`."""
        handles = []
        if running:
            self._enter(self.model, None)
        for module in self._names:
            if running and module is self.model:
                continue  # it is in the midst of its own hooks
            handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            # A compiled region would hide its operations.
            with torch.compiler.set_stance("force_eager"), _Operations(self._operation):
                yield
        finally:
            for handle in handles:
                handle.remove()
            self._stack.clear()

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, module: nn.Module, _: object) -> None:
        self._stack.append((module, [0]))

    def _leave(self, module: nn.Module, *_: object) -> None:
        if self._stack and self._stack[-1][0] is module:  # a hook that has been removed may still run once
            self._stack.pop()

    def _operation(self, call: Call) -> Tensor:
        if not self._stack:
            return call.run()
        module, counter = self._stack[-1]
        ordinal, counter[0] = counter[0], counter[0] + 1
        # Aliases, whose gradients are this call's alone: a kernel may be shared, an input used elsewhere too.
        parameter = call.kernel
        if torch.is_grad_enabled():
            call = Call(call.function, _alias(call.input), _alias(call.kernel), call.bias, call.settings)
        output = call.run()
        with torch.no_grad(), torch.autocast(call.input.device.type, enabled=False):
            patch = batched(call.patch_average())
            record = record_forward(call, output, patch)
        layer = self._layer(module, ordinal, call, parameter)
        layer.calls.append(record)
        self._watch(record, call, output, patch)
        return output

    def _layer(self, module: nn.Module, ordinal: int, call: Call, kernel: Tensor) -> LayerRecord:
        name = self._names[module]
        layer = self.layers.get((name, ordinal))
        if layer is None:
            filters = call.filters(wide(call.kernel))
            layer = self.layers[name, ordinal] = LayerRecord(
                name=(name or type(module).__name__) + (f" ({ordinal + 1})" if ordinal else ""),
                kind=type(module).__name__.removeprefix("Parametrized"),
                operation=call.function.__name__,
                kernel_shape=tuple(kernel.shape),
                dtype=output_dtype(call),
                fan_in=filters.shape[1],
                layout=call.layout,
                filter_mean=filters.double().mean(1),
                kernel_norm=sum_of_squares([kernel]) ** 0.5,
            )
        if layer.step_map is None and torch.is_grad_enabled() and kernel.requires_grad:
            layer.step_map = StepMap(kernel, [p for p in self.model.parameters() if p.requires_grad])
            self._follow(layer.step_map.uses())
        return layer

    def _follow(self, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter not in self._followed:
                self._followed.add(parameter)
                handle = parameter.register_hook(self._keep(parameter))  # type: ignore[no-untyped-call]
                self._handles.append(handle)

    def _keep(self, parameter: nn.Parameter) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            self.gradients[parameter] = gradient.detach()

        return hook

    def _watch(self, record: CallRecord, call: Call, output: Tensor, patch: Tensor) -> None:
        # A hook that held a tensor of the graph would keep the graph alive with itself, for ever.
        layout, kernel_OK = call.layout, call.filters(call.kernel.detach())

        def of_output(delta: Tensor) -> None:
            record_backward(record, layout, patch, delta)
            if self.on_backward_end is not None:  # once a pass: the engine calls it when everything else is done
                torch.autograd.Variable._execution_engine.queue_callback(self.on_backward_end)
                self.on_backward_end = None

        def of_input(gradient: Tensor) -> None:
            record.input_gradient_squares = sum_of_squares([gradient])

        def of_kernel(gradient: Tensor) -> None:
            gradient_OK = layout.filters(wide(gradient))
            record.kernel_gradient = gradient_OK.double().mean(1)
            norms = torch.linalg.vector_norm(gradient_OK, dim=1) * torch.linalg.vector_norm(wide(kernel_OK), dim=1)
            record.radial = float((gradient_OK * wide(kernel_OK)).sum()), float(torch.linalg.vector_norm(norms))

        hooks: list[tuple[Tensor, Callable[[Tensor], None]]]
        hooks = [(output, of_output), (call.input, of_input), (call.kernel, of_kernel)]
        for tensor, hook in hooks:
            if tensor.requires_grad and torch.is_grad_enabled():
                tensor.register_hook(torch.no_grad()(hook))  # type: ignore[no-untyped-call]


def output_dtype(call: Call) -> torch.dtype:
    """The precision that the operation runs in."""
    device = call.input.device.type
    if torch.is_autocast_enabled(device) and call.input.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return call.input.dtype


def _alias(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor) if tensor.requires_grad else tensor


class _Operations(TorchFunctionMode):
    """Hands every operation with a weight to `handler`."""

    def __init__(self, handler: Callable[[Call], Tensor]) -> None:
        super().__init__()
        self.handler = handler

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = call_of(function, args, kwargs or {})
        return function(*args, **(kwargs or {})) if call is None else self.handler(call)
