"""Leave a model, and the process around it, as they were found."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pws._autocast import fresh_casts


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Run with copies of the buffers (BatchNorm's running statistics); put gradients and all random generators back.

    The buffers themselves are never written, so a backward pass of the caller's that needs them still can run.
    """
    buffers = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    copies: dict[int, Tensor] = {}
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    rewind = random_state(model)
    try:
        for module, name, buffer in buffers:
            if buffer is not None:
                module._buffers[name] = copies.setdefault(id(buffer), buffer.clone())
        with fresh_casts():
            yield
    finally:
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        for parameter, gradient in gradients:
            parameter.grad = gradient
        rewind()


def random_state(*models: nn.Module) -> Callable[[], None]:
    """Remember the random generators of Python, NumPy and torch (the CPU and the models' devices); the result rewinds."""
    python, cpu, accelerators = random.getstate(), torch.get_rng_state(), _accelerator_states(models)
    numpy = sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()

    def rewind() -> None:
        random.setstate(python)
        torch.set_rng_state(cpu)
        for device, state in accelerators:
            torch.get_device_module(device).set_rng_state(state, device)
        if numpy is not None:
            numpy.random.set_state(numpy_state)

    return rewind


def _accelerator_states(models: Iterable[nn.Module]) -> list[tuple[torch.device, Tensor]]:
    used = {parameter.device for model in models for parameter in model.parameters()}
    devices = [device for device in used if device.type not in ("cpu", "meta")]
    return [(device, torch.get_device_module(device).get_rng_state(device)) for device in devices]
