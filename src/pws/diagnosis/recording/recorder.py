"""Records one forward and backward pass of a model, whoever runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pws.diagnosis.recording.backward_pass import BackwardPass
from pws.diagnosis.recording.computed_kernel import recomputed_kernel
from pws.diagnosis.recording.gates import Gates
from pws.diagnosis.recording.layer_record import CallRecord, LayerRecord, record_backward, record_forward
from pws.diagnosis.recording.marked import kernel_step, marked_weights
from pws.diagnosis.recording.moments import batched, sum_of_squares, wide
from pws.diagnosis.recording.step_map import StepMap
from pws.diagnosis.recording.weighted_operation import Call, Operations
from pws.surgery.standardized import is_standardized


@dataclass
class _Running:
    """A module in the midst of its forward pass."""

    module: nn.Module
    args: Any
    kwargs: Any
    operations: int = 0
    """How many operations with a weight it has called itself."""


class Recorder:
    """The layers of `model` in execution order, with what each call did.

    `with recorder.forward():` around the forward pass collects its statistics and leaves hooks on the tensors of the
    graph, which collect those of the backward pass. Nothing stays on the model: module hooks are removed at the end of
    the forward pass, the hooks on parameters by `close`.

    Args:
        model: what is recorded.
        optimizer: holds `w` and `alpha` of marked layers.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model, self.optimizer = model, optimizer
        self.layers: dict[tuple[str, int], LayerRecord] = {}
        self.steps: dict[nn.Parameter, Tensor] = {}
        """By how much a gradient step at learning rate 1 moves a parameter, with its sign turned: its gradient, but for the
        kernel of a marked layer."""
        self._marked = marked_weights(model)
        self._names = {module: name for name, module in model.named_modules()}
        self._stack: list[_Running] = []
        self._computed: dict[tuple[str, int], _Running] = {}
        self._handles: list[Any] = []
        self._gates = Gates()
        self._followed: set[nn.Parameter] = set()
        self.backward = BackwardPass(on_begin=self.forget_backward)

    @contextmanager
    def forward(self, *, running: tuple[Any, Any] | None = None) -> Iterator[None]:
        """Record the operations called inside, by the innermost module that is running.

        `running` are the arguments of the model itself, if its forward pass has begun already.
        """
        handles = []
        self.backward.in_forward = True
        if self.backward.on_end is not None:
            trained = [p for p in self.model.parameters() if p.requires_grad and p.is_leaf]
            self._handles += [p.register_post_accumulate_grad_hook(self.backward.accumulated) for p in trained]
        if running is not None:
            self._enter(self.model, *running)
        for module in self._names:
            if running is not None and module is self.model:
                continue  # it is in the midst of its own hooks
            handles.append(module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            # A compiled region would hide its operations.
            with torch.compiler.set_stance("force_eager"), Operations(self._operation):
                yield
        finally:
            for handle in handles:
                handle.remove()
            self._stack.clear()
            self.backward.in_forward = False
            ends = self._gates.ends()
            for key in ends if len(ends) > 1 else ():
                self.layers[key].predicts = True
            for key in self._gates.found():
                self.layers[key].gate = True
        self._map_computed_kernels()

    @property
    def first_input_is_finite(self) -> bool:
        """Whether that of the first layer is."""
        return all(bool(layer.calls[0].input.mean.isfinite().all()) for layer in list(self.layers.values())[:1])

    def abandon(self) -> None:
        """The forward pass failed: leave its kernels alone."""
        self._computed.clear()

    def forget_backward(self) -> None:
        """Forget what a backward pass has told."""
        self.steps.clear()
        self.backward.trains = False
        for layer in self.layers.values():
            for call in layer.calls:
                call.backward = call.input_gradient_squares = call.kernel_gradient = call.radial = None

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._stack.append(_Running(module, args, kwargs))

    def _leave(self, module: nn.Module, *_: object) -> None:
        if self._stack and self._stack[-1].module is module:  # a hook that has been removed may still run once
            self._stack.pop()

    def _operation(self, call: Call) -> Tensor:
        if not self._stack:
            return call.run()
        running = self._stack[-1]
        ordinal, running.operations = running.operations, running.operations + 1
        # Aliases, whose gradients are this call's alone: a kernel may be shared, an input used elsewhere too.
        parameter, key = call.kernel, (self._names[running.module], ordinal)
        self._gates.takes(key, call.input.grad_fn)
        self._gates.takes(key, parameter.grad_fn, as_kernel=True)
        if torch.is_grad_enabled():
            call = Call(call.function, _alias(call.input), _alias(call.kernel), call.bias, call.settings)
        output = call.run()
        self._gates.makes(key, output.grad_fn)
        with torch.no_grad(), torch.autocast(call.input.device.type, enabled=False):
            patch = batched(call.patch_average())
            record = record_forward(call, output, patch)
        layer = self._layer(running, ordinal, call, parameter)
        layer.calls.append(record)
        self._watch(record, call, output, patch)
        return output

    def _layer(self, running: _Running, ordinal: int, call: Call, kernel: Tensor) -> LayerRecord:
        name, kind = self._names[running.module], type(running.module).__name__
        layer = self.layers.get((name, ordinal))
        if layer is None:
            filters = call.filters(wide(call.kernel))
            layer = self.layers[name, ordinal] = LayerRecord(
                name=(name or kind) + (f" ({ordinal + 1})" if ordinal else ""),
                kind=kind.removeprefix("Parametrized") + (", pws" if is_standardized(running.module) else ""),
                operation=call.function.__name__,
                kernel_shape=tuple(kernel.shape),
                dtype=output_dtype(call),
                fan_in=filters.shape[1],
                layout=call.layout,
                filter_mean=filters.double().mean(1),
                kernel_norm=sum_of_squares([kernel]) ** 0.5,
            )
        if layer.step_map is None and torch.is_grad_enabled() and kernel.requires_grad:
            layer.trained = True
            if isinstance(kernel, nn.Parameter):
                self._map(layer, kernel)
            else:
                self._computed.setdefault((name, ordinal), running)
        return layer

    def _map(self, layer: LayerRecord, kernel: Tensor) -> None:
        layer.step_map = StepMap(kernel, [p for p in self.model.parameters() if p.requires_grad])
        self._follow(layer.step_map.uses())

    def _map_computed_kernels(self) -> None:
        """For the kernels that are computed: their graph, made once more and alone.

        Not within the forward pass, whose own graph is not ours to walk: checkpointing counts what it saves, and a kernel may
        hang on activations.
        """
        for (name, ordinal), running in self._computed.items():
            kernel = recomputed_kernel(running.module, running.args, running.kwargs, ordinal)
            if kernel is not None:
                self._map(self.layers[name, ordinal], kernel)
        self._computed.clear()

    def _follow(self, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter not in self._followed:
                self._followed.add(parameter)
                handle = parameter.register_hook(self._keep(parameter))
                self._handles.append(handle)

    def _keep(self, parameter: nn.Parameter) -> Callable[[Tensor], None]:
        layer = self._marked.get(parameter)

        def keep(gradient: Tensor) -> None:
            # At once: an optimizer that steps in the backward pass moves the latents next.
            self.steps[parameter] = (
                gradient.detach() if layer is None else kernel_step(layer, gradient, self.optimizer).to(gradient.dtype)
            )

        return self.backward.hook(keep, trains=True)

    def _watch(self, record: CallRecord, call: Call, output: Tensor, patch: Tensor) -> None:
        # A hook that held a tensor of the graph would keep the graph alive with itself, for ever.
        layout, kernel_OK = call.layout, call.filters(call.kernel.detach())

        def of_output(delta: Tensor) -> None:
            record_backward(record, layout, patch, delta)

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
                tensor.register_hook(self.backward.hook(hook))


def output_dtype(call: Call) -> torch.dtype:
    """The precision that the operation runs in."""
    device = call.input.device.type
    if torch.is_autocast_enabled(device) and call.input.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return call.input.dtype


def _alias(tensor: Tensor) -> Tensor:
    # Not a view by shape: that would give dimensions of size 1 other strides, and the operation another memory format.
    return torch.ops.aten.alias(tensor) if tensor.requires_grad else tensor
