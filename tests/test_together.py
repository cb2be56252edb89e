"""`standardize_together`: the same numbers as layer by layer, and each layer for itself wherever that is asked for."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
from backends import INTERPRETED, device_of
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.func import functional_call
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import pws
from pws import kernels
from pws.together import LARGEST_ON_CPU


class Widen(nn.Module):
    """`features` features, by repetition."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, input: Tensor) -> Tensor:
        return input.repeat(1, -(-self.features // input.shape[1]))[:, : self.features]


def model_of(backend: str) -> nn.Sequential:
    """Few filters, for the interpreter takes a millisecond for each, with fan-ins for every path of the kernels: 9, 27 and 147,
    aligned and not, 300 in one block, 1030 and 2052 in several; a layer without a bias, a transposed one, one that is used
    twice."""
    twice = pws.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
    model = nn.Sequential(
        pws.Conv2d(3, 4, 7, padding=3),
        *(nn.ReLU(), twice, nn.ReLU(), twice, nn.ReLU(), pws.ConvTranspose2d(4, 3, 3), pws.Conv2d(3, 4, 3, stride=3)),
        *(nn.Flatten(1), Widen(300), pws.Linear(300, 3, gain="linear"), Widen(1030), pws.Linear(1030, 4, gamma=0.1)),
        *(Widen(2052), pws.Linear(2052, 2, relative_gamma=True)),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(device_of(backend))


def results(model: nn.Module, images: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The output and all gradients."""
    model.zero_grad()
    with torch.autocast(images.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        output = model(images)
    torch.autograd.backward(output.float().square().sum())
    return [output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.fixture
def images(backend: str) -> Tensor:
    return torch.randn(2, 3, 7, 7, device=device_of(backend))


def assert_same(mine: list[Tensor], alone: list[Tensor], closeness: float = 1e-4) -> None:
    assert len(mine) == len(alone)
    for a, b in zip(mine, alone, strict=True):
        assert (a - b).abs().max() <= closeness * b.abs().max()


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


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_compiled_model(backend: str, images: Tensor, dtype: torch.dtype | None) -> None:
    """For a GPU the compiled program calls one operator each way; for a CPU it has the formula of each layer in it."""
    model = model_of(backend)
    expected = results(model, images, dtype)
    pws.standardize_together(model)
    graphs: list[list[str]] = []

    def look(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Any:
        parts = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
        graphs.append([str(node.target) for part in parts for node in part.graph.nodes])
        return lookup_backend("aot_eager")(graph, examples)

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=look)
    for _ in range(2):
        assert_same(results(compiled, images, dtype), expected, 1e-4 if dtype is None else 3e-2)
    assert len(graphs) == 1
    for operator in ("standardize_together", "standardize_together_backward"):
        assert graphs[0].count(f"pws.{operator}") == (backend == "triton")
    assert all(layer.prepared is None for layer in model if isinstance(layer, pws.Conv2d))


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


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_has_none_of_our_operators(backend: str, images: Tensor, strict: bool) -> None:
    model = model_of(backend)
    pws.standardize_together(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as: side effects in the forward pass
        exported = torch.export.export(model, (images,), strict=strict)
    assert not [node for node in exported.graph.nodes if "pws" in str(node.target)]
    assert_same([exported.module()(images)], [model(images)])


def test_a_model_without_pws_layers() -> None:
    with pytest.raises(pws.PwsError, match=r"for models with pws layers; Linear has none. pws.convert makes them"):
        pws.standardize_together(nn.Linear(3, 2))


@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="a graph is captured on a GPU")
def test_a_captured_graph() -> None:
    model = model_of("triton").requires_grad_(False)
    pws.standardize_together(model)
    images = torch.randn(2, 3, 7, 7, device="cuda")
    expected = model(images)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        model(images)
    graph = torch.cuda.CUDAGraph()
    with kernels.use("triton"), torch.cuda.graph(graph, stream=stream):
        output = model(images)
    graph.replay()
    torch.cuda.synchronize()
    assert_same([output], [expected])
