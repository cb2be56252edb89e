"""`standardize_together`: the same numbers as layer by layer, and each layer for itself wherever that is asked for."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from backends import INTERPRETED, device_of
from together_model import assert_same, model_of, results
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import pws
from pws.together import LARGEST_ON_CPU


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_the_numbers_are_those_of_each_layer_alone(
    backend: str, images: Tensor, dtype: torch.dtype | None, memory_format: torch.memory_format
) -> None:
    model = model_of(backend).to(memory_format=memory_format)
    alone = results(model, images, dtype)
    handle = pws.standardize_together(model)
    # In bfloat16 a convolution's own gradient may differ in its last bit, 2^-8, from run to run.
    assert_same(results(model, images, dtype), alone, 1e-4 if dtype is None else 1e-2)
    assert model[0].weight.grad.is_contiguous(memory_format=memory_format)
    handle.remove()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_it_is_used_and_let_go_of(backend: str, images: Tensor) -> None:
    model = model_of(backend)
    pws.standardize_together(model)
    seen = []

    def look(layer: pws.Conv2d, *_: object) -> None:
        seen.append(layer.kernel().grad_fn)

    layers = [m for m in model.modules() if isinstance(m, pws.Conv2d | pws.Linear)]
    for layer in layers:
        layer.register_forward_hook(look)
    model(images)
    assert len(seen) == len(layers) + 1  # one is used twice
    assert len(set(seen)) == 1
    assert "_Together" in type(seen[0]).__name__
    assert all(layer.prepared is None for layer in layers)
    with pytest.raises(RuntimeError):
        model(images[:, :2])
    assert all(layer.prepared is None for layer in layers)


def test_each_pass_sees_the_weights_of_its_time(backend: str, images: Tensor) -> None:
    model = model_of(backend)
    pws.standardize_together(model)
    for _ in range(2):
        alone = copy.deepcopy(model)
        alone._forward_pre_hooks.clear()
        assert_same(results(model, images), results(alone, images))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-1.1)


@pytest.mark.parametrize("through_data", [False, True])
def test_a_layer_changed_during_the_pass_computes_anew(backend: str, images: Tensor, through_data: bool) -> None:
    model = model_of(backend)
    pws.standardize_together(model)

    def change(layer: nn.Module, _: object) -> None:
        with torch.no_grad():
            if through_data:
                layer.weight.data = -layer.weight
            else:
                layer.weight.neg_()

    handle = model[0].register_forward_pre_hook(change)
    mine = results(model, images)
    handle.remove()
    assert_same(mine, results(model, images))
    before = model[0].kernel().detach()
    model[0].gain *= 2
    assert not torch.allclose(mine[0], model(images))
    assert_same([model[0].kernel().detach()], [2 * before])


def test_a_step_before_the_backward_pass_is_an_error_where_the_gradient_is_wanted(backend: str, images: Tensor) -> None:
    model = nn.ModuleList([pws.Linear(4, 3), pws.Linear(4, 3)]).to(images.device)
    both = Both(model)
    pws.standardize_together(both)
    first, second = both(images.flatten(1)[:, :4])
    with torch.no_grad():
        model[0].weight.add_(1)
    torch.autograd.backward(second.sum())
    assert model[1].weight.grad is not None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(first.sum())


class Both(nn.Module):
    """Two towers, of which nothing is common."""

    def __init__(self, towers: nn.ModuleList) -> None:
        super().__init__()
        self.towers = towers

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        return tuple(tower(features) for tower in self.towers)


def test_two_backward_passes_through_layers_of_their_own(backend: str, images: Tensor) -> None:
    both = Both(nn.ModuleList([pws.Linear(4, 3), pws.Linear(4, 3)]).to(images.device))
    features = images.flatten(1)[:, :4]
    for output in both(features):
        torch.autograd.backward(output.square().sum())
    expected = [p.grad for p in both.parameters()]
    both.zero_grad()
    pws.standardize_together(both)
    for output in both(features):
        torch.autograd.backward(output.square().sum())
    assert_same([p.grad for p in both.parameters()], expected)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_and_unused_layers(backend: str, images: Tensor, frozen: bool) -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model_of(backend)
            self.unused = pws.Linear(3, 2).to(device_of(backend))

        def forward(self, images: Tensor) -> Tensor:
            return self.layers(images)

    model = Skips()
    model.layers[0].requires_grad_(not frozen)
    alone = results(model, images)
    pws.standardize_together(model)
    seen = []
    model.layers[0].register_forward_hook(lambda layer, _, output: seen.append((layer.prepared, output)))
    assert_same(results(model, images), alone)
    prepared, output = seen[0]
    assert prepared.kernel.requires_grad == output.requires_grad == (not frozen)
    assert model.unused.weight.grad is None
    assert (model.layers[0].weight.grad is None) == frozen


def test_gradients_of_gradients(backend: str, images: Tensor) -> None:
    model = model_of(backend)
    weight = model[0].weight

    def second() -> Tensor:
        loss = model(images).square().sum()
        first = torch.autograd.grad(loss, weight, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), weight)[0]

    alone = second()
    pws.standardize_together(model)
    assert_same([second()], [alone], 1e-4)


def test_checkpointing_no_gradients_and_functional_calls(backend: str, images: Tensor) -> None:
    model = model_of(backend)
    inner = nn.Sequential(*model)
    pws.standardize_together(model)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: Tensor) -> Tensor:
            return checkpoint(self.inner, images, use_reentrant=False)

    again = Checkpointed()
    expected = results(model, images)
    pws.standardize_together(again)
    assert_same(results(again, images), expected)
    with torch.no_grad():
        assert_same([model(images)], expected[:1])
    with torch.inference_mode():
        assert_same([model(images)], expected[:1])
    others = {name: 2 * p.detach() for name, p in model.named_parameters()}
    doubled = copy.deepcopy(inner)
    doubled.load_state_dict(others, strict=False)  # the layer that is used twice has a second name
    assert_same([functional_call(model, others, images)], [doubled(images)])


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is for one thread")
def test_passes_in_several_threads(backend: str, images: Tensor) -> None:
    model = model_of(backend)
    pws.standardize_together(model)
    expected = model(images)
    seen: list[Tensor] = []
    workers = [threading.Thread(target=lambda: seen.extend(model(images) for _ in range(5))) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(seen) == 15
    assert_same(seen, [expected] * 15)


def test_copies_and_folded_models(backend: str, images: Tensor) -> None:
    model = model_of(backend)
    pws.standardize_together(model)
    pws.standardize_together(model)  # the second in place of the first
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1
    copies: list[nn.Module] = []
    handle = model[2].register_forward_hook(lambda *_: copies.append(copy.deepcopy(model)))
    expected = results(model, images)
    handle.remove()
    copies[0][2]._forward_hooks.clear()
    assert_same(results(copies[0], images), expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(results(other, images), expected)
    folded = pws.fold(model)
    assert not folded._forward_hooks
    assert not folded._forward_pre_hooks
    assert_same([folded(images)], expected[:1])


def test_a_pruned_layer(backend: str, images: Tensor) -> None:
    model = model_of(backend)
    pws.standardize_together(model)
    prune.l1_unstructured(model[0], "weight", 0.5)
    seen = []
    model[2].register_forward_hook(lambda layer, *_: seen.append(layer.prepared is not None))
    assert_same([model(images)], [nn.Sequential(*model)(images)])
    assert seen == [True, True, False, False]
    pws.standardize_together(model).remove()


def test_large_weights_of_a_cpu_stay_apart() -> None:
    model = nn.Sequential(pws.Linear(8, 4), pws.Linear(4, LARGEST_ON_CPU // 4), pws.Linear(LARGEST_ON_CPU // 4, 5))
    pws.standardize_together(model)
    seen = []
    for layer in model:
        layer.register_forward_hook(lambda layer, *_: seen.append(layer.prepared is not None))
    model(torch.randn(2, 8))
    assert seen == [True, True, False]


def test_a_default_device_is_not_for_tables(backend: str, images: Tensor) -> None:
    model = model_of(backend)
    pws.standardize_together(model)
    with torch.device("meta"):
        assert model(images).device == images.device


def test_a_model_without_pws_layers() -> None:
    with pytest.raises(pws.PwsError, match=r"for models with pws layers; Linear has none. pws.convert makes them"):
        pws.standardize_together(nn.Linear(3, 2))
