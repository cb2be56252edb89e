"""Leave a model as it was found."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Run with copies of the buffers (BatchNorm's running statistics); put gradients and all random generators back.

    The buffers themselves are never written, so a backward pass of the caller's that needs them still can run.
    """
    buffers = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    copies: dict[int, Tensor] = {}
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    states = random.getstate(), torch.get_rng_state(), _accelerator_states(model)
    numpy = sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()
    try:
        for module, name, buffer in buffers:
            if buffer is not None:
                module._buffers[name] = copies.setdefault(id(buffer), buffer.clone())
        yield
    finally:
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        for parameter, gradient in gradients:
            parameter.grad = gradient
        random.setstate(states[0])
        torch.set_rng_state(states[1])
        for device, state in states[2]:
            torch.get_device_module(device).set_rng_state(state, device)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


def _accelerator_states(model: nn.Module) -> list[tuple[torch.device, Tensor]]:
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type not in ("cpu", "meta")}
    return [(device, torch.get_device_module(device).get_rng_state(device)) for device in devices]
