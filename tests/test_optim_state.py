"""The latents of an optimizer: made from any weight, kept while the kernel is ours, else made anew; saved and loaded."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn
from twins import (
    assert_standardized,
    backward,
    batches,
    kinds,
    mixed,
    same_bits,
    snapshot,
    train,
)

import pws
from pws._mark import adopt, filters_of, mark, mark_of
from pws.optim import SGD, AdamW

Make = Callable[[nn.Module], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda model: SGD(model, lr=0.05, momentum=0.9),
    "adamw": lambda model: AdamW(model, lr=0.01, eps=1e-4),  # as float16 needs
}
optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def narrow() -> tuple[nn.Sequential, Any]:
    return mixed(torch.float32)


def latents(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    weights = [module.weight for module in model.modules() if mark_of(module)]
    return [optimizer.state[weight][key].clone() for weight in weights for key in ("w", "alpha")]


@pytest.mark.parametrize("kind", kinds())
def test_making_an_optimizer_takes_the_means_out_of_the_kernels_and_no_more(kind: str) -> None:
    layer = mark(kinds()[kind][0]())
    before = filters_of(layer, layer.weight.detach().clone())
    layout = layer.weight.stride()
    SGD(layer, lr=0.1)
    dims = tuple(range(1, before.dim()))
    assert_close(filters_of(layer, layer.weight), before - before.mean(dims, keepdim=True), "float32")
    assert layer.weight.stride() == layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_rounding_leaves_of_the_means_is_left_alone(dtype: torch.dtype) -> None:
    layer = mark(nn.Linear(64, 256)).to(dtype)
    SGD(layer, lr=0.1)
    before = layer.weight.detach().clone()
    means = before.double().mean(1).abs() / before.double().std(1)
    assert float(means.max()) < torch.finfo(dtype).eps
    SGD(layer, lr=0.1)
    assert torch.equal(layer.weight, before)


@optimizers
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])
def test_a_weight_of_any_size_is_adopted_with_latents_of_kaimings_size(make: Make, size: float) -> None:
    layer = mark(nn.Conv2d(4, 8, 3).double())
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight) * size)
    optimizer = make(layer)
    kernel = layer.weight.detach().clone()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    layer(torch.randn(2, 4, 5, 5).double()).square().mean().backward()
    optimizer.step()
    assert_close(layer.weight / size, kernel / size, "float64")
    w = optimizer.state[layer.weight]["w"]
    assert_close(w.flatten(1).std(1, correction=0), torch.full((8,), (2 / 36) ** 0.5), "float32")
    assert_standardized(layer, optimizer, "float64")


@optimizers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_latents_of_a_half_precision_model_are_its_master_weights(make: Make, dtype: torch.dtype) -> None:
    """Steps far below the kernel's resolution add up."""
    model = nn.Sequential(mark(nn.Linear(64, 8)), nn.Tanh(), mark(nn.Linear(8, 3), gain="linear")).to(dtype)
    optimizer = make(model)
    for group in optimizer.param_groups:
        group["lr"] = 1e-5
    data = batches((64,), dtype=dtype)
    train(model, optimizer, data, 1)
    before = latents(model, optimizer)
    assert all(latent.dtype == torch.float32 for latent in before)
    model[0].zero_grad()
    train(model, optimizer, data, 20)
    assert not any(torch.equal(a, b) for a, b in zip(before, latents(model, optimizer), strict=True))
    assert_standardized(model, optimizer, str(dtype).removeprefix("torch."))
    assert all(parameter.dtype == dtype for parameter in model.parameters())


@optimizers
def test_a_pretrained_model_keeps_its_function_but_for_the_means(make: Make) -> None:
    model, data = mixed()
    plain = deepcopy(model)
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), data, 5)
    model.load_state_dict(plain.state_dict())
    optimizer = make(model)
    for module, other in zip(model, plain, strict=True):
        if mark_of(module):
            filters = filters_of(other, other.weight)
            centred = filters - filters.mean(tuple(range(1, filters.dim())), keepdim=True)
            assert_close(filters_of(module, module.weight), centred, "float64")
    losses = train(model, optimizer, data, 20)
    assert sum(losses[-4:]) < sum(losses[:4])
    assert_standardized(model, optimizer, "float64")


def written_by(name: str) -> Callable[[nn.Module], None]:
    def load(model: nn.Module) -> None:
        model.load_state_dict({key: value * 1.5 for key, value in model.state_dict().items()})

    def initialize(model: nn.Module) -> None:
        for module in model:
            if mark_of(module):
                nn.init.kaiming_normal_(module.weight)

    @torch.no_grad()
    def copy(model: nn.Module) -> None:
        for module in model:
            if mark_of(module):
                module.weight.copy_(torch.randn_like(module.weight))

    return {"load_state_dict": load, "nn.init": initialize, "copy_": copy}[name]


@optimizers
@pytest.mark.parametrize("name", ["load_state_dict", "nn.init", "copy_"])
def test_a_kernel_that_somebody_else_has_written_is_adopted(make: Make, name: str) -> None:
    model, data = mixed()
    optimizer = make(model)
    train(model, optimizer, data, 3)
    written_by(name)(model)
    wanted = [adopt(filters_of(m, m.weight), mark_of(m)) for m in model if mark_of(m)]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, data, 1)
    for found, expected in zip(latents(model, optimizer), [t for pair in wanted for t in pair], strict=True):
        assert_close(found, expected, "float64")
    assert_standardized(model, optimizer, "float64")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_change_of_one_per_cent_is_seen_in_every_precision(dtype: torch.dtype) -> None:
    layer = mark(nn.Linear(16, 4)).to(dtype)
    optimizer = SGD(layer, lr=0.0)
    x = torch.randn(2, 16, dtype=dtype)
    for factor in (1.0, 1.01):
        with torch.no_grad():
            layer.weight.mul_(factor)
        kernel = layer.weight.detach().clone()
        layer(x).sum().backward()
        optimizer.step()
        assert float((layer.weight.detach() - kernel).norm() / kernel.norm()) < 0.003


@optimizers
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_kernel_that_has_the_same_values_again_keeps_its_latents(make: Make, dtype: torch.dtype) -> None:
    model, data = mixed(dtype)
    optimizer = make(model)
    train(model, optimizer, data, 3)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = latents(model, optimizer)
    model.load_state_dict(deepcopy(model.state_dict()))
    train(model, optimizer, data, 1)
    assert same_bits(before, latents(model, optimizer))


@optimizers
def test_steps_at_rate_zero_keep_latents_and_kernels(make: Make) -> None:
    model, data = narrow()
    optimizer = make(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, data, 1)
    before, kernels = latents(model, optimizer), [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, data, 3)
    assert same_bits(before, latents(model, optimizer))
    for one, other in zip(kernels, model.parameters(), strict=True):
        assert_close(one, other, "float32")


@optimizers
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_model_cast_after_the_optimizer_was_made(make: Make, steps_before: int) -> None:
    model, data = narrow()
    optimizer = make(model)
    train(model, optimizer, data, steps_before)
    model.to(torch.bfloat16)
    half = [(x.bfloat16(), y) for x, y in data]
    losses = train(model, optimizer, half, 24)
    assert sum(losses[-4:]) < sum(losses[:4])
    assert all(latent.dtype == torch.float32 for latent in latents(model, optimizer))
    assert_standardized(model, optimizer, "bfloat16")


@optimizers
def test_a_model_in_another_memory_format_after_some_steps(make: Make) -> None:
    model, data = mixed()
    optimizer = make(model)
    twin, other = deepcopy((model, optimizer))
    for net, own in ((model, optimizer), (twin, other)):
        train(net, own, data, 3)
        if net is model:
            net.to(memory_format=torch.channels_last)
            assert not net[0].weight.is_contiguous()
        train(net, own, data, 5)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(one, two, "trajectory")


@optimizers
@pytest.mark.parametrize("value", [0.0, 0.3])
def test_weights_that_are_constant_learn(make: Make, value: float) -> None:
    model = nn.Sequential(mark(nn.Conv2d(3, 6, 3)), nn.Tanh(), nn.Flatten(), mark(nn.Linear(54, 3), gain="linear"))
    for module in (model[0], model[3]):
        nn.init.constant_(module.weight, value)
    optimizer = make(model)
    data = batches((3, 5, 5), dtype=torch.float32)
    losses = train(model, optimizer, data, 40)
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert (model[3].weight.std(1) > 0).all()
    assert_standardized(model[3], optimizer)


@optimizers
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_one_clear_error(make: Make, bad: float) -> None:
    model, data = narrow()
    optimizer = make(model)
    with torch.no_grad():
        model[5].weight[0, 0] = bad
    backward(model, data[0])
    with pytest.raises(
        pws.PwsError, match=r"the weight '5.weight' holds NaN or infinity, and has no standardized form"
    ):
        optimizer.step()


@optimizers
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_training_goes_on_from_a_saved_file_to_the_same_bits(make: Make, dtype: torch.dtype) -> None:
    model, data = mixed(dtype)
    optimizer = make(model)
    train(model, optimizer, data, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    train(model, optimizer, data, 5)
    other, _ = mixed(dtype)
    again = make(other)
    train(other, again, data, 2)
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    train(other, again, data, 5)
    assert same_bits(snapshot(model, optimizer), snapshot(other, again))


@optimizers
@pytest.mark.parametrize(
    "copied_by", [deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_model_and_optimizer_goes_its_own_way(make: Make, copied_by: Callable[[Any], Any]) -> None:
    model, data = narrow()
    optimizer = make(model)
    train(model, optimizer, data, 3)
    copied, copy = copied_by((model, optimizer))
    before = snapshot(model, optimizer)
    train(copied, copy, data, 5)
    assert same_bits(before, snapshot(model, optimizer))
    assert copy.step_bound == optimizer.step_bound
    train(model, optimizer, data, 5)
    assert same_bits(snapshot(copied, copy), snapshot(model, optimizer))


def test_the_state_of_a_plain_optimizer_is_adopted_without_its_averages() -> None:
    """They are averages of gradients of the kernel, not of `w`."""
    model, data = mixed()
    plain = torch.optim.SGD(pws.param_groups(model, lr=0.05), momentum=0.9, nesterov=True)
    train(model, plain, data, 3)
    momentum = plain.state[model[2].weight]["momentum_buffer"].clone()
    optimizer = SGD(model, lr=0.3, momentum=0.5)
    fresh, other = deepcopy((model, optimizer))
    optimizer.load_state_dict(plain.state_dict())
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.05, 0.9)
    assert torch.equal(optimizer.state[model[2].weight]["momentum_buffer"], momentum)
    assert "momentum_buffer" not in optimizer.state[model[0].weight]
    for group in other.param_groups:
        group.update(lr=0.05, momentum=0.9, nesterov=True)
    train(model, optimizer, data, 1)
    train(fresh, other, data, 1)
    assert_close(model[0].weight, fresh[0].weight, "float64")


def test_the_state_of_another_model_is_refused() -> None:
    model, data = mixed()
    optimizer = SGD(model, lr=0.1)
    train(model, optimizer, data, 1)
    wider = nn.Sequential(*(deepcopy(module) for module in model))
    wider[0] = mark(nn.Conv2d(3, 8, 5, padding=2).double())
    with pytest.raises(pws.PwsError, match=r"filters of shape \(8, 3, 3, 3\) for '0.weight', which has \(8, 3, 5, 5\)"):
        SGD(wider, lr=0.1).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        SGD(nn.Sequential(deepcopy(model[0]), nn.BatchNorm2d(8)), lr=0.1).load_state_dict(
            SGD(nn.Sequential(deepcopy(model[0])), lr=0.1).state_dict()
        )
