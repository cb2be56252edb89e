"""Two processes train as one does, under DDP and FSDP2, and their checkpoints pass from one number of processes to another.

Both processes run every check in one go (`work`); the tests look at what they have left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tolerances import assert_close
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from twins import Batches, train

import pws
from pws._mark import mark, mark_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
STEPS: Final = 10
HALF: Final = STEPS // 2
Result = dict[str, Any]
OPTIMIZERS: Final[dict[str, Callable[..., torch.optim.Optimizer]]] = {
    "sgd": lambda net, **more: pws.optim.SGD(net, lr=0.3, momentum=0.9, weight_decay=0.01, **more),
    "adamw": lambda net, **more: pws.optim.AdamW(net, lr=0.1, weight_decay=0.1, **more),
}
names = pytest.mark.parametrize("name", OPTIMIZERS)
LAYOUTS: Final = {
    "nested": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True),
}


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Numbers of filters that two processes can't halve, down to one; a plain layer and a norm; a transposed convolution."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(mark(nn.Conv2d(3, 5, 3, padding=1)), nn.Tanh(), nn.GroupNorm(1, 5)),
        *(mark(nn.ConvTranspose2d(5, 6, 2, stride=2)), nn.Tanh()),
        *(mark(nn.Conv2d(6, 3, 3, stride=2, bias=False)), nn.Flatten(), nn.Linear(48, 7), nn.Tanh()),
        *(mark(nn.Linear(7, 1), gain="linear"), nn.Linear(1, 3)),
    ).to(dtype)


def data(rank: int | None = None, dtype: torch.dtype = torch.float64) -> Batches:
    """Batches of eight, or the half of each that is a rank's."""
    generator = torch.Generator().manual_seed(1)
    part = slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
    return [
        (
            torch.randn(8, 3, 5, 5, generator=generator).to(dtype)[part],
            torch.randint(3, (8,), generator=generator)[part],
        )
        for _ in range(STEPS)
    ]


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def everything(net: nn.Module, optimizer: torch.optim.Optimizer) -> Result:
    """All parameters, with what the optimizer keeps of them."""
    found = {name: whole(parameter) for name, parameter in net.named_parameters()}
    for name, parameter in net.named_parameters():
        kept = optimizer.state[parameter].items()
        found |= {f"{name}/{key}": whole(value) for key, value in kept if isinstance(value, Tensor)}
    return found


def assert_equal_to(found: Result, expected: Result, row: str = "trajectory") -> None:
    assert found.keys() == expected.keys()
    for key in expected:
        assert found[key].shape == expected[key].shape
        assert_close(found[key], expected[key], row)


def one(name: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Result:
    """One process that sees the whole batches."""
    net = network(dtype=dtype)
    optimizer = OPTIMIZERS[name](net, **settings)
    train(net, optimizer, data(dtype=dtype), STEPS)
    return everything(net, optimizer)


# What both processes do.


def ddp(rank: int, name: str, *, optimizer_first: bool) -> Result:
    """Each rank starts from weights of its own."""
    net = network(seed=rank)
    optimizer = OPTIMIZERS[name](net) if optimizer_first else None
    wrapped = DistributedDataParallel(net, gradient_as_bucket_view=optimizer_first)
    if optimizer is None:
        optimizer = OPTIMIZERS[name](wrapped)
    train(wrapped, optimizer, data(rank), STEPS)
    return everything(net, optimizer)


def shard(net: nn.Sequential, shape: tuple[int, ...] = (2,), nested: bool = True) -> nn.Sequential:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    along_filters = {id(layer.weight) for layer in net if isinstance(layer, nn.ConvTranspose2d)}
    for module in [*(list(net) if nested else []), net]:
        if list(module.parameters()):
            fully_shard(module, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if id(p) in along_filters else None)
    return net


def sharded(rank: int, name: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Result:
    net = shard(network(dtype=dtype), **settings)
    optimizer = OPTIMIZERS[name](net)
    train(net, optimizer, data(rank, dtype), STEPS)
    return everything(net, optimizer)


def rewritten(net: nn.Module, batches: Batches) -> Result:
    """Other weights are loaded into the model after half of the steps."""
    optimizer = OPTIMIZERS["sgd"](net)
    train(net, optimizer, batches, HALF)
    weights = network(seed=5).state_dict()
    set_model_state_dict(net, weights, options=StateDictOptions(full_state_dict=True))
    train(net, optimizer, batches[HALF:], STEPS - HALF)
    return everything(net, optimizer)


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.LayerNorm(6), mark(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 4), mark(nn.Linear(4, 3)))
    return nn.Sequential(*layers).double()


def split(net: nn.Sequential) -> nn.Sequential:
    """Tensor parallelism: marked filters and columns of a plain layer over the processes; a norm gets half of each sample."""
    norm, along_filters, along_columns = SequenceParallel(), ColwiseParallel(input_layouts=Shard(1)), RowwiseParallel()
    return parallelize_module(net, init_device_mesh("cpu", (2,)), {"0": norm, "1": along_filters, "3": along_columns})


def sequences(rank: int | None = None) -> Batches:
    generator = torch.Generator().manual_seed(2)
    part = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    return [
        (torch.randn(5, 4, 6, generator=generator).double()[:, part], torch.randint(3, (5, 3), generator=generator))
        for _ in range(STEPS)
    ]


def tensor_parallel(net: nn.Module, batches: Batches) -> Result:
    optimizer = OPTIMIZERS["sgd"](net)
    train(net, optimizer, batches, STEPS)
    return everything(net, optimizer)


def refused(layer: nn.Module, optimizer: Callable[..., Any] = pws.optim.SGD) -> str:
    net = fully_shard(nn.Sequential(mark(layer)), mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(pws.PwsError) as caught:
        optimizer(net, lr=0.1)
    return str(caught.value)


def not_finite(rank: int, number: int) -> tuple[str, bool]:
    """Rank 1 alone finds NaN in its part of a gradient; no rank may move, and none may wait for the other."""
    net = shard(network())
    optimizer = OPTIMIZERS["sgd"](net)
    train(net, optimizer, data(rank), 1)
    before = everything(net, optimizer)
    if rank == 1:
        net[number].weight.grad.to_local()[0] = float("nan")
    with pytest.raises(pws.optim.NonFiniteGradientError) as caught:
        optimizer.step()
    after = everything(net, optimizer)
    return str(caught.value), all(torch.equal(before[key], after[key]) for key in before)


def saved(rank: int, folder: str, name: str) -> None:
    """A checkpoint after half of the steps, in every layout."""
    net = shard(network())
    optimizer = OPTIMIZERS[name](net)
    train(net, optimizer, data(rank), HALF)
    for layout, options in LAYOUTS.items():
        model, state = get_state_dict(net, optimizer, options=options)
        dcp.save({"model": model, "optimizer": state}, checkpoint_id=f"{folder}/two-{name}-{layout}")


def loaded(rank: int, folder: str, name: str, layout: str) -> Result:
    """One process's checkpoint, read by two."""
    net = shard(network(seed=5))
    optimizer = OPTIMIZERS[name](net)
    load(net, optimizer, f"{folder}/one-{name}-{layout}", layout)
    train(net, optimizer, data(rank)[HALF:], STEPS - HALF)
    return everything(net, optimizer)


def load(net: nn.Module, optimizer: torch.optim.Optimizer, path: str, layout: str) -> None:
    model, state = get_state_dict(net, optimizer, options=LAYOUTS[layout])
    found = {"model": model, "optimizer": state}
    dcp.load(found, checkpoint_id=path)
    set_state_dict(
        *(net, optimizer),
        model_state_dict=found["model"],
        optim_state_dict=found["optimizer"],
        options=LAYOUTS[layout],
    )


def computing() -> nn.Sequential:
    """Layers that compute their kernel, with numbers of filters that two processes can't halve."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(pws.Conv2d(3, 8, 3, gain="linear"), nn.Tanh(), pws.Conv2d(8, 13, 3), nn.Flatten()),
        *(pws.Linear(13, 1), nn.Linear(1, 3)),
    ).double()


def clipped(net: nn.Module, batches: Batches, scale: float = 1.0, average: Sequence[nn.Parameter] = ()) -> Result:
    """Trained by torch's own SGD behind `pws.clip_grad`; and the lengths that it found."""
    optimizer = torch.optim.SGD(pws.param_groups(net, lr=2.0 / scale), momentum=0.9)
    lengths = []
    for images, labels in batches:
        optimizer.zero_grad()
        (scale * nn.functional.cross_entropy(net(images), labels)).backward()
        for parameter in average:  # what DDP does
            distributed.all_reduce(parameter.grad)
            parameter.grad /= 2
        lengths.append(pws.clip_grad(net, optimizer).double())
        optimizer.step()
    return {**{name: whole(p) for name, p in net.named_parameters()}, "lengths": torch.stack(lengths)}


def partly_sharded(rank: int) -> Result:
    net = computing()
    fully_shard(net[2], mesh=init_device_mesh("cpu", (2,)))
    plain = [parameter for parameter in net.parameters() if not hasattr(parameter, "to_local")]
    return clipped(net, data(rank), average=plain)


def not_diagnosed(run: Callable[[nn.Module], Any]) -> str:
    with pytest.raises(pws.PwsError) as caught:
        run(shard(computing()))
    return str(caught.value)


def checks(rank: int, folder: str) -> Iterator[tuple[str, Any]]:
    for name in OPTIMIZERS:
        yield f"ddp-{name}", ddp(rank, name, optimizer_first=False)
        yield f"ddp-{name}-optimizer first", ddp(rank, name, optimizer_first=True)
        yield f"fsdp-{name}", sharded(rank, name)
        yield f"fsdp-{name}-float32", sharded(rank, name, torch.float32)
        saved(rank, folder, name)
        for layout in LAYOUTS:
            yield f"loaded-{name}-{layout}", loaded(rank, folder, name, layout)
    yield "fsdp-sgd-whole", sharded(rank, "sgd", nested=False)
    yield "fsdp-sgd-replicated", sharded(rank, "sgd", shape=(2, 1))
    yield "rewritten", rewritten(shard(network()), data(rank))
    yield "tensor parallel", tensor_parallel(split(perceptron()), sequences(rank))
    yield "refused", refused(nn.ConvTranspose2d(4, 6, 2))
    yield "refused groups", refused(nn.ConvTranspose2d(4, 6, 2, groups=2))
    yield "refused wrapped", refused(nn.Linear(4, 6), partial(pws.optim.Wrapped, optimizer=torch.optim.SGD))
    yield "clipped", clipped(shard(computing()), data(rank))
    yield "clipped replicated", clipped(shard(computing(), shape=(2, 1)), data(rank))
    yield "clipped partly", partly_sharded(rank)
    yield "clipped large", clipped(shard(computing()), data(rank), scale=1e30)
    batch, loss = data(rank)[0], nn.functional.cross_entropy
    yield "diagnose", not_diagnosed(lambda net: pws.diagnose(net, batch, loss))
    yield "forecast", not_diagnosed(lambda net: pws.forecast(net, [batch, batch], loss))
    yield "not finite", [not_finite(rank, number) for number in (0, 7)]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)  # a rank that fails lets the other one go
    store = f"file://{folder}/rendezvous"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=limit)
    torch.save(dict(checks(rank, folder)), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process leaves checkpoints; then two do all their work."""
    found = tmp_path_factory.mktemp("processes")
    for name in OPTIMIZERS:
        net = network()
        optimizer = OPTIMIZERS[name](net)
        train(net, optimizer, data(), HALF)
        for layout, options in LAYOUTS.items():
            model, state = get_state_dict(net, optimizer, options=options)
            dcp.save({"model": model, "optimizer": state}, checkpoint_id=found / f"one-{name}-{layout}")
    multiprocessing.spawn(work, (str(found),), nprocs=2)
    return found


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Result]:
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def assert_both_equal(ranks: list[Result], key: str, expected: Result, row: str = "trajectory") -> None:
    first, second = (rank[key] for rank in ranks)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_equal_to(first, expected, row)


@names
def test_the_bound_acts_in_what_is_compared(name: str) -> None:
    bounded, free = one(name), one(name, step_bound=None)
    marked = [f"{key}.weight" for key, module in network().named_modules() if mark_of(module)]
    assert all(float((bounded[key] - free[key]).abs().max()) > 1e-3 for key in marked)


@names
@pytest.mark.parametrize("order", ["", "-optimizer first"])
def test_two_processes_under_ddp_are_one(ranks: list[Result], name: str, order: str) -> None:
    """Also where the optimizer was made before DDP gave all ranks the weights of the first."""
    assert_both_equal(ranks, f"ddp-{name}{order}", one(name))


@names
def test_two_processes_under_fully_shard_are_one(ranks: list[Result], name: str) -> None:
    assert_both_equal(ranks, f"fsdp-{name}", one(name))


@names
def test_the_fused_step_moves_shards_too(ranks: list[Result], name: str) -> None:
    assert_both_equal(ranks, f"fsdp-{name}-float32", one(name, torch.float32), "trajectory float32")


@pytest.mark.parametrize("how", ["whole", "replicated"])
def test_however_the_model_is_sharded(ranks: list[Result], how: str) -> None:
    """As one unit; replicated over one dimension of the mesh and sharded over the other."""
    assert_both_equal(ranks, f"fsdp-sgd-{how}", one("sgd"))


def test_weights_that_are_loaded_into_shards_are_adopted(ranks: list[Result]) -> None:
    assert_both_equal(ranks, "rewritten", rewritten(network(), data()))


def test_tensor_parallelism_with_gradients_in_parts(ranks: list[Result]) -> None:
    assert_both_equal(ranks, "tensor parallel", tensor_parallel(perceptron(), sequences()))


@pytest.mark.parametrize("how", ["", " replicated", " partly"])
def test_clip_grad_of_shards_is_that_of_one_process(ranks: list[Result], how: str) -> None:
    expected = clipped(computing(), data())
    assert float(expected["lengths"].min()) > 0.03, "the bound must act"
    assert_both_equal(ranks, f"clipped{how}", expected)


def test_clip_grad_of_large_shards(ranks: list[Result]) -> None:
    assert_both_equal(ranks, "clipped large", clipped(computing(), data(), scale=1e30))


@pytest.mark.parametrize("run", ["diagnose", "forecast"])
def test_a_sharded_model_is_not_diagnosed_for_the_true_reason(ranks: list[Result], run: str) -> None:
    for rank in ranks:
        assert "split over processes (fully_shard" in rank[run]
        assert "pws.Monitor measures it" in rank[run]


def test_filters_that_are_split_are_refused_with_the_remedy(ranks: list[Result]) -> None:
    for rank in ranks:
        assert "'0.weight' is split as S(0) and holds its filters along dimension 1" in rank["refused"]
        assert "Split it so: fully_shard(model, shard_placement_fn=" in rank["refused"]
        assert "in groups. Take the mark off this layer" in rank["refused groups"]


def test_a_wrapped_optimizer_refuses_parts_of_matrices(ranks: list[Result]) -> None:
    for rank in ranks:
        assert "Use pws.optim.SGD or AdamW under fully_shard" in rank["refused wrapped"]


def test_a_gradient_that_is_not_finite_on_one_process_stops_both(ranks: list[Result]) -> None:
    for rank in ranks:
        for message, unchanged in rank["not finite"]:
            assert "the step was not taken" in message
            assert unchanged


@names
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_go_on_from_the_checkpoint_of_one(ranks: list[Result], name: str, layout: str) -> None:
    assert_both_equal(ranks, f"loaded-{name}-{layout}", one(name))


@names
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("writers", ["one", "two"])
def test_one_process_goes_on_from_the_checkpoint_of(folder: Path, name: str, layout: str, writers: str) -> None:
    net = network(seed=5)
    optimizer = OPTIMIZERS[name](net)
    load(net, optimizer, str(folder / f"{writers}-{name}-{layout}"), layout)
    train(net, optimizer, data()[HALF:], STEPS - HALF)
    assert_equal_to(everything(net, optimizer), one(name))


def test_a_copy_of_the_state_dict_is_loaded_as_it_is() -> None:
    """Without reading it into the state of the moment before."""
    net, other = network(), network(seed=5)
    optimizer, its = OPTIMIZERS["sgd"](net), OPTIMIZERS["sgd"](other)
    train(net, optimizer, data(), HALF)
    model, state = deepcopy(get_state_dict(net, optimizer))
    set_state_dict(other, its, model_state_dict=model, optim_state_dict=state)
    assert_equal_to(everything(other, its), everything(net, optimizer))
