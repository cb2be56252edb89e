"""The two forms of one model, and the bound on a step written out: what the optimizers are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, Final

import reference
import torch
from tolerances import assert_close
from torch import Tensor, nn

import pws
from pws._mark import adopt, filters_of, mark, mark_of

BOUND: Final = 0.03
CONV: Final = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
Batches = Sequence[tuple[Tensor, Tensor]]


def kinds() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    """Every kind of layer with the shape of a sample."""
    return {
        "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (3, 9)),
        "conv2d": (lambda: nn.Conv2d(3, 4, 3), (3, 5, 5)),
        "conv2d without bias": (lambda: nn.Conv2d(3, 4, 3, bias=False), (3, 5, 5)),
        "conv2d groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
        "conv2d depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="circular"), (4, 4, 4)),
        "conv2d dilation": (lambda: nn.Conv2d(2, 4, 3, dilation=2, stride=2), (2, 7, 7)),
        "conv2d channels_last": (lambda: nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last), (4, 5, 5)),
        "conv2d 1x1": (lambda: nn.Conv2d(8, 4, 1), (8, 3, 3)),
        "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 3, 3, 3)),
        "transposed 1d": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2, output_padding=1), (3, 5)),
        "transposed 2d": (lambda: nn.ConvTranspose2d(3, 4, 3, padding=1), (3, 4, 4)),
        "transposed groups": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (4, 2, 2)),
        "transposed depthwise": (lambda: nn.ConvTranspose2d(3, 3, 2, groups=3, bias=False), (3, 3, 3)),
        "transposed one in": (lambda: nn.ConvTranspose2d(1, 4, 2), (1, 3, 3)),
        "transposed one out": (lambda: nn.ConvTranspose2d(4, 1, 2), (4, 3, 3)),
        "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 2, 2)),
        "linear": (lambda: nn.Linear(6, 4), (6,)),
        "linear fan-in 2": (lambda: nn.Linear(2, 4, bias=False), (2,)),
        "linear sequence": (lambda: nn.Linear(6, 4), (3, 6)),
    }


def single(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Batches]:
    """A marked layer and a plain one, with batches."""
    make, shape = kinds()[kind]
    layer = mark(make(), gain="linear")
    body = nn.Sequential(layer, nn.Tanh(), nn.Flatten())
    body.append(nn.Linear(body(torch.zeros(1, *shape)).shape[1], 3))
    return body.to(dtype), batches(shape, dtype=dtype)


def mixed(dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Batches]:
    """Marked layers of several kinds, a plain one and a norm."""
    model = nn.Sequential(
        *(mark(nn.Conv2d(3, 8, 3, padding=1), gain=1.5, relative_gamma=True), nn.Tanh()),
        *(nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Tanh()),
        *(mark(nn.ConvTranspose2d(6, 8, 2, stride=2, groups=2), gamma=0.1), nn.Tanh()),
        *(mark(nn.Conv2d(8, 8, 3, groups=8, stride=2, bias=False)), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        mark(nn.Linear(32, 3), gain="linear"),
    )
    return model.to(dtype), batches((3, 6, 6), dtype=dtype)


def batches(shape: Sequence[int], count: int = 4, samples: int = 6, dtype: torch.dtype = torch.float64) -> Batches:
    return [(torch.randn(samples, *shape).to(dtype), torch.randint(3, (samples,))) for _ in range(count)]


def layer_form(model: nn.Module) -> nn.Module:
    """A copy whose marked layers compute their kernels from `weight` and `alpha`."""
    twin = deepcopy(model)
    for name, layer in list(twin.named_modules()):
        found = mark_of(layer)
        if found is None:
            continue
        names = ("in_features", "out_features") if isinstance(layer, nn.Linear) else CONV
        names += ("output_padding",) if "Transpose" in type(layer).__name__ else ()
        settings = {n: getattr(layer, n) for n in names} | vars(found)
        ours = getattr(pws, type(layer).__name__)(**settings, bias=layer.bias is not None).to(layer.weight.dtype)
        w, alpha = adopt(filters_of(layer, layer.weight), found)
        with torch.no_grad():
            ours.weight.copy_(filters_of(layer, w))
            ours.alpha.copy_(alpha)
            if layer.bias is not None:
                ours.bias.copy_(layer.bias)
        twin.set_submodule(name, ours)
    return twin


def clip(model: nn.Module, optimizer: torch.optim.Optimizer, bound: float = BOUND) -> list[float]:
    """`pws.clip_grad` written out in the gradients' own precision; the lengths before."""
    rates = {
        parameter: max(group[key] for key in ("lr", "initial_lr", "max_lr") if key in group)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    lengths = []
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p in rates and p.grad is not None]
        if own:
            length = float(torch.cat([(rates[p] * p.grad).flatten() for p in own]).norm())
            lengths.append(length)
            for p in own:
                p.grad.mul_(min(1.0, bound / length) if length else 1.0)
    return lengths


def backward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    return loss.detach()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Batches,
    steps: int = 50,
    before: Callable[[], Any] = lambda: None,
    schedule: Any = None,
) -> list[float]:
    """The losses of some steps; `before` is called in front of each step."""
    losses = []
    for i in range(steps):
        optimizer.zero_grad()
        losses.append(float(backward(model, data[i % len(data)])))
        before()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return losses


def assert_alike(model: nn.Module, optimizer: torch.optim.Optimizer, twin: nn.Module, row: str = "trajectory") -> None:
    """The marked layers' latents and kernels, and every plain parameter, are those of the layer form."""
    layers = dict(twin.named_modules())
    for name, module in model.named_modules():
        other = layers[name]
        if mark_of(module) is None:
            for key, parameter in module.named_parameters(recurse=False):
                assert_close(parameter, other.get_parameter(key), row)
            continue
        state = optimizer.state[module.weight]
        assert_close(state["w"], other.filters(), row)
        assert_close(state["alpha"], other.alpha, row)
        assert_close(module.weight, other.kernel(), row)
        if module.bias is not None:
            assert_close(module.bias, other.bias, row)


def assert_standardized(model: nn.Module, optimizer: torch.optim.Optimizer, row: str = "kernel float32") -> None:
    """The weights of marked layers are the kernels of the latents, by the formula."""
    for module in model.modules():
        found = mark_of(module)
        if found is None:
            continue
        state = optimizer.state[module.weight]
        settings = {"gain": found.gain, "gamma": found.gamma, "relative": found.relative_gamma}
        kernel = reference.kernel(state["w"], state["alpha"], **settings)
        if "Transpose" in type(module).__name__:
            blocks = kernel.split(module.out_channels // module.groups)
            kernel = torch.cat([block.transpose(0, 1) for block in blocks])
        assert_close(module.weight, kernel, row)
        assert (kernel.flatten(1).std(1) > 0).all()


def positions(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Each layer's parameters, and `w` and alpha in place of a marked weight, as one vector."""
    found = {}
    for name, module in model.named_modules():
        parts = []
        for parameter in module.parameters(recurse=False):
            state = optimizer.state[parameter]
            parts += [state["w"], state["alpha"]] if "w" in state else [parameter]
        if parts:
            found[name] = torch.cat([part.detach().flatten() for part in parts])
    return found


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of everything that training changes."""
    tensors = [*model.state_dict().values()]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return [tensor.detach().clone() for tensor in tensors]


def same_bits(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
