"""Leave a model as it was found."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put buffers (BatchNorm's running statistics), gradients and the state of every random generator back at the end."""
    buffers = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    values = [None if buffer is None else (buffer.clone(), buffer._version) for _, _, buffer in buffers]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    states = random.getstate(), torch.get_rng_state(), _accelerator_states(model)
    numpy = sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        with torch.no_grad():
            for (module, name, buffer), value in zip(buffers, values, strict=True):
                module._buffers[name] = buffer
                # Untouched ones are not written: a backward pass of the caller's may still need them as they are.
                if buffer is not None and value is not None and buffer._version != value[1]:
                    buffer.copy_(value[0])
        for parameter, gradient in gradients:
            parameter.grad = gradient
        random.setstate(states[0])
        torch.set_rng_state(states[1])
        for device, state in states[2]:
            torch.get_device_module(device).set_rng_state(state, device)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


def _accelerator_states(model: nn.Module) -> list[tuple[torch.device, torch.Tensor]]:
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type not in ("cpu", "meta")}
    return [(device, torch.get_device_module(device).get_rng_state(device)) for device in devices]
