"""The fused steps against the reference in float64, and what they promise beside numbers."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest
import reference
import torch
from backends import HERE, INTERPRETED, device_of
from tolerances import assert_close
from torch import Tensor, nn

import pws
from pws import kernels
from pws.kernels import AdamWRates, Layer, SGDRates, steps_of
from pws.kernels.reference import ReferenceStep
from pws.optim.bound import factors_of

MANY = (6, 9) if INTERPRETED else (4096, 9)  # the interpreter takes milliseconds per filter
SHAPES = [(1, 2), (3, 9), (2, 27), (3, 576), (2, 1025), (2, 4608), (1, 25088), MANY]
MIXED = [(3, 3, 3, 3), (2, 8, 3, 3), (3, 16), MANY, (4, 1, 3, 3), (2, 3, 5)]
MOMENTUM = [(0.0, False), (0.9, False), (0.9, True)]
HALF = (torch.bfloat16, torch.float16)
PEAKS = (0.2, 0.1, 0.4)

backends = pytest.mark.parametrize("backend", HERE)


def layer_of(
    shape: Sequence[int],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    moments: int = 1,
    bias: bool = True,
    channels_last: bool = False,
) -> Layer:
    """A layer in the middle of training, with gradients of size 1."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    filters, n = shape[0], math.prod(shape[1:])

    def weight(scale: float = 1.0, kind: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(*shape) * scale).to(device, kind).contiguous(memory_format=layout)

    def column(scale: float = 1.0, kind: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(filters) * scale).to(device, kind)

    averages = [lambda t: t * 0.1, lambda t: t.square() * 0.1][:moments]
    return Layer(
        name=str(tuple(shape)),
        c=1.5 / math.sqrt(n),
        gamma=1e-3,
        kernel=weight(kind=dtype),
        is_copy=False,
        w=weight((2 / n) ** 0.5) + 0.1,
        alpha=column() + 0.5,
        bias=column(kind=dtype) if bias else None,
        moments=[of(weight()) for of in averages],
        alpha_moments=[of(column()) for of in averages],
        bias_moments=[of(column(kind=dtype)) for of in averages] if bias else [],
        grad_dtype=dtype,
        grad=weight(kind=dtype),
        bias_grad=column(kind=dtype) if bias else None,
        peaks=PEAKS,
    )


def wide(layer: Layer) -> Layer:
    """A copy in float64 on the CPU."""

    def copy(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to("cpu", torch.float64, copy=True)

    names = ("kernel", "w", "alpha", "bias", "grad", "bias_grad")
    lists = ("moments", "alpha_moments", "bias_moments")
    tensors = {name: copy(getattr(layer, name)) for name in names}
    return replace(layer, **tensors, **{name: [copy(t) for t in getattr(layer, name)] for name in lists})


def sgd_rates(momentum: float = 0.9, nesterov: bool = False) -> SGDRates:
    return SGDRates(0.1, 0.05, 0.2, 0.01, 0.02, momentum, nesterov)


def adamw_rates(eps: float = 0.1) -> AdamWRates:
    # With an eps far below the gradients an entry near 0 counts as much as any, and so does its rounding.
    return AdamWRates(0.1, 0.05, 0.2, 0.01, 0.02, 0.9, 0.99, eps, 1 - 0.9**5, 1 - 0.99**5)


def take(backend: str, layers: list[Layer], rates: SGDRates | AdamWRates, bound: float | None) -> Tensor:
    """One step; the squared lengths that it measured."""
    for layer in layers:
        layer.rates = rates
    with kernels.use(backend):
        steps = steps_of(layers)
    squares = torch.zeros(len(layers), dtype=torch.float64)
    for step, numbers in steps:
        found = step.squares()
        if isinstance(rates, SGDRates):
            step.sgd(factors_of(found, bound))
        else:
            found = step.adamw_squares()
            step.adamw(factors_of(found, bound))
        squares[numbers] = found.to("cpu", torch.float64)
    return squares


def assert_same(layers: list[Layer], wanted: list[Layer], kernel_row: str = "kernel float32") -> None:
    half = layers[0].kernel.dtype in HALF
    for mine, other in zip(layers, wanted, strict=True):
        assert_close(mine.kernel.cpu(), other.kernel, kernel_row)
        pairs = [(mine.w, other.w), (mine.alpha, other.alpha)]
        pairs += [*zip(mine.moments, other.moments, strict=True)]
        pairs += [*zip(mine.alpha_moments, other.alpha_moments, strict=True)]
        for a, b in pairs:
            assert_close(a.cpu(), b, "kernel float32")
        if mine.bias is not None:
            for a, b in [(mine.bias, other.bias), *zip(mine.bias_moments, other.bias_moments, strict=True)]:
                assert_close(a.cpu(), b, "half bias" if half else "kernel float32")


def assert_lengths(squares: Tensor, expected: Tensor, layers: list[Layer]) -> None:
    """Of SGD: from sums of which most may cancel."""
    for mine, other, layer in zip(squares, expected, layers, strict=True):
        _, root = reference.normalized(layer.w.cpu(), layer.gamma, relative=False)
        scale = reference.per_filter(layer.c * layer.alpha.cpu().double() / root, layer.w)
        size = float((PEAKS[0] * scale * layer.grad.cpu().double()).square().sum()) + float(other)
        assert_close(mine / size, other / size, "length from sums")


@backends
@pytest.mark.parametrize("bound", [None, 0.03])
@pytest.mark.parametrize(("momentum", "nesterov"), MOMENTUM)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sgd(backend: str, shape: tuple[int, int], momentum: float, nesterov: bool, bound: float | None) -> None:
    layers = [layer_of(shape, device_of(backend), moments=int(momentum > 0))]
    wanted, start = [wide(layer) for layer in layers], [wide(layer) for layer in layers]
    squares = take(backend, layers, sgd_rates(momentum, nesterov), bound)
    expected = take("reference", wanted, sgd_rates(momentum, nesterov), bound)
    assert_lengths(squares, expected, start)
    assert_same(layers, wanted)


@backends
@pytest.mark.parametrize("bound", [None, 0.03])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adamw(backend: str, shape: tuple[int, int], bound: float | None) -> None:
    layers = [layer_of(shape, device_of(backend), moments=2)]
    wanted = [wide(layer) for layer in layers]
    squares = take(backend, layers, adamw_rates(), bound)
    assert_close(squares, take("reference", wanted, adamw_rates(), bound), "kernel float32")
    assert_same(layers, wanted)


@backends
@pytest.mark.parametrize("rates", [sgd_rates(), adamw_rates()], ids=["sgd", "adamw"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_layers_of_many_shapes_with_and_without_bias(
    backend: str, rates: SGDRates | AdamWRates, channels_last: bool
) -> None:
    moments = 2 if isinstance(rates, AdamWRates) else 1
    layers = [
        layer_of(
            shape,
            device_of(backend),
            moments=moments,
            bias=i % 3 != 1,
            channels_last=channels_last and len(shape) == 4,
        )
        for i, shape in enumerate(MIXED)
    ]
    wanted = [wide(layer) for layer in layers]
    for _ in range(2):
        for layer, other in zip(layers, wanted, strict=True):
            layer.grad.copy_(torch.randn(layer.grad.shape))
            other.grad.copy_(layer.grad)
        take(backend, layers, rates, 0.05)
        take("reference", wanted, rates, 0.05)
    assert_same(layers, wanted)


@pytest.mark.parametrize("backend", ["triton"] if "triton" in HERE else ["reference"])
@pytest.mark.parametrize("rates", [sgd_rates(), adamw_rates()], ids=["sgd", "adamw"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", [(3, 9), (7, 1023), (2, 9000)], ids=str)
def test_half_precision_kernels_and_gradients(
    backend: str, shape: tuple[int, int], dtype: torch.dtype, rates: SGDRates | AdamWRates
) -> None:
    layers = [layer_of(shape, device_of(backend), dtype, moments=2 if isinstance(rates, AdamWRates) else 1)]
    wanted = [wide(layer) for layer in layers]
    bound = 0.05 if isinstance(rates, SGDRates) else None  # AdamW's length has the rounding of the bias in it
    take(backend, layers, rates, bound)
    take("reference", wanted, rates, bound)
    row = str(dtype).removeprefix("torch.")
    assert_same(layers, wanted, "bfloat16 cut" if INTERPRETED and dtype == torch.bfloat16 else row)


@pytest.mark.parametrize("backend", [*HERE, *([] if INTERPRETED else ["reference"])])
@pytest.mark.parametrize("mean", [30.0, 1e4, -1e6])
def test_gradients_with_a_large_mean_have_a_length(backend: str, mean: float) -> None:
    """An average-gradient ratio near 1: nearly all of the sum of squares is taken away again."""
    layer = layer_of((4, 576), device_of(backend), moments=0, bias=False)
    layer.grad.add_(mean)
    wanted, start = wide(layer), wide(layer)
    square = take(backend, [layer], sgd_rates(0.0), 0.03)
    expected = take("reference", [wanted], sgd_rates(0.0), 0.03)
    assert square >= 0
    assert torch.isfinite(layer.kernel).all()
    if backend != "reference":
        assert_lengths(square, expected, [start])
    if mean == 30.0:
        assert_same([layer], [wanted])


@backends
@pytest.mark.parametrize("rates", [sgd_rates(), adamw_rates(1e-8)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("what", ["gradients of zero", "alpha of zero", "constant filters"])
def test_nothing_to_divide_by(backend: str, what: str, rates: SGDRates | AdamWRates) -> None:
    layer = layer_of((4, 27), device_of(backend), moments=2 if isinstance(rates, AdamWRates) else 1)
    if what == "gradients of zero":
        for tensor in (layer.grad, layer.bias_grad, *layer.moments, *layer.alpha_moments, *layer.bias_moments):
            tensor.zero_()
    elif what == "alpha of zero":
        layer.alpha.zero_()
    else:
        layer.w.copy_(torch.full_like(layer.w, 0.3))
    wanted = wide(layer)
    square = take(backend, [layer], rates, 0.03)
    expected = take("reference", [wanted], rates, 0.03)
    assert torch.isfinite(square).all()
    if what != "constant filters" or isinstance(rates, SGDRates):  # AdamW makes steps of rounding
        assert_close(square, expected, "kernel float32")
        assert_close(layer.w.cpu(), wanted.w, "kernel float32")
        assert_close(layer.alpha.cpu(), wanted.alpha, "kernel float32")
    assert torch.isfinite(layer.kernel).all()


@pytest.mark.parametrize("backend", [*HERE, *([] if INTERPRETED else ["reference"])])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["grad", "bias_grad"])
def test_a_gradient_that_is_not_finite_shows_in_its_layers_length_alone(backend: str, where: str, value: float) -> None:
    layers = [layer_of(shape, device_of(backend)) for shape in ((2, 27), (5, 9), (3, 5))]
    getattr(layers[1], where).view(-1)[4] = value
    for layer in layers:
        layer.rates = sgd_rates()
    with kernels.use(backend):
        ((step, _),) = steps_of(layers)
    assert torch.isfinite(step.squares()).tolist() == [True, False, True]


@backends
@pytest.mark.parametrize("rates", [sgd_rates(), adamw_rates()], ids=["sgd", "adamw"])
def test_a_mean_of_a_hundred_deviations_costs_no_digits(backend: str, rates: SGDRates | AdamWRates) -> None:
    """Decay pulls the latents' mean, and nothing else takes it away."""
    layer = layer_of((3, 576), device_of(backend), moments=2 if isinstance(rates, AdamWRates) else 1)
    layer.w.add_(100 * (2 / 576) ** 0.5)
    wanted = wide(layer)
    take(backend, [layer], rates, 0.03)
    take("reference", [wanted], rates, 0.03)
    scale = wanted.kernel.abs().max()
    assert_close(layer.kernel.cpu().double() / scale, wanted.kernel / scale, "large mean")


@pytest.mark.skipif(INTERPRETED, reason="for the step with threads")
@pytest.mark.parametrize("rates", [sgd_rates(), adamw_rates()], ids=["sgd", "adamw"])
def test_the_same_bits_from_run_to_run_and_for_any_number_of_threads(rates: SGDRates | AdamWRates) -> None:
    start = [layer_of(shape, moments=2 if isinstance(rates, AdamWRates) else 1) for shape in [*SHAPES[2:], *MIXED]]
    threads, seen = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            layers = [copied(layer) for layer in start]
            take("cpu", layers, rates, 0.03)
            assert torch.get_num_threads() == count
            seen.append([tensor for layer in layers for tensor in (layer.kernel, layer.w, layer.alpha, layer.bias)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in seen[1:] for a, b in zip(seen[0], run, strict=True))


def copied(layer: Layer) -> Layer:
    lists = {name: [t.clone() for t in getattr(layer, name)] for name in ("moments", "alpha_moments", "bias_moments")}
    return replace(layer, **{name: getattr(layer, name).clone() for name in ("kernel", "w", "alpha", "bias")}, **lists)


@pytest.mark.skipif(INTERPRETED, reason="for the step with threads")
def test_many_threads_at_once() -> None:
    """As several models that train side by side, or layers that step in autograd's threads."""
    start = [layer_of((64, 576)) for _ in range(4)]
    expected = [copied(layer) for layer in start]
    for layer in expected:
        for _ in range(10):
            take("cpu", [layer], sgd_rates(), 0.03)
    workers = []
    for layer in start:
        layer.rates = sgd_rates()
        ((step, _),) = steps_of([layer])

        def run(step: kernels.Step = step) -> None:
            for _ in range(10):
                step.sgd(factors_of(step.squares(), 0.03))

        workers.append(threading.Thread(target=run))
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    for layer, other in zip(start, expected, strict=True):
        assert torch.equal(layer.w, other.w)
        assert torch.equal(layer.kernel, other.kernel)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter serves the CPU")
def test_the_choice_by_device_and_dtype() -> None:
    names = ["CpuStep", "ReferenceStep", "ReferenceStep"]
    layers = [layer_of((4, 9)), layer_of((4, 9), dtype=torch.bfloat16), wide(layer_of((4, 9)))]
    steps = steps_of([*layers, layer_of((3, 2))])
    assert [(type(step).__name__, numbers) for step, numbers in steps] == [*zip(names, [[0, 3], [1], [2]], strict=True)]
    with kernels.use("reference"):
        assert kernels.chosen() == "reference"
        assert isinstance(steps_of(layers)[0][0], ReferenceStep)
        with kernels.use(None):
            assert type(steps_of(layers)[0][0]).__name__ == "CpuStep"
    assert kernels.chosen() is None


@pytest.mark.skipif(INTERPRETED, reason="the interpreter serves the CPU")
@pytest.mark.parametrize(
    ("name", "dtype"), [("triton", torch.float32), ("cpu", torch.float64), ("cpu", torch.bfloat16)], ids=str
)
def test_a_step_that_cannot_move_a_layer_says_so(name: str, dtype: torch.dtype) -> None:
    layer = wide(layer_of((4, 9))) if dtype == torch.float64 else layer_of((4, 9), dtype=dtype)
    with (
        kernels.use(name),
        pytest.raises(pws.PwsError, match=rf"the step {name} was asked for, and can't move '\(4, 9\)'"),
    ):
        steps_of([layer])


def test_an_unknown_step_is_refused_with_the_nearest() -> None:
    with pytest.raises(pws.PwsError, match="unknown step implementation 'tritn'; did you mean triton"):
        kernels.use("tritn").__enter__()


@pytest.mark.skipif(INTERPRETED, reason="said once")
def test_without_numba_the_reference_moves_everything_and_asking_for_the_cpu_step_fails() -> None:
    code = """
import sys
sys.modules["numba"] = None
import torch, pws
model = pws.mark(torch.nn.Linear(4, 3))
optimizer = pws.optim.SGD(model, lr=0.1)
model(torch.ones(2, 4)).sum().backward()
optimizer.step()
assert "cpu" not in pws.kernels.installed()
try:
    pws.kernels.use("cpu").__enter__()
except pws.PwsError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "the step cpu can't be imported" in done.stdout
    assert "pip install 'pws-torch[kernels]'" in done.stdout


@pytest.mark.skipif(INTERPRETED, reason="this is that run")
def test_tritons_step_in_tritons_interpreter() -> None:
    """The tests above once more, for triton on the CPU: the interpreter has to be there when triton is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.skipif(INTERPRETED, reason="this process tests triton's step")
@pytest.mark.parametrize("bound", [None, 1e-3])
def test_the_cpus_step_in_one_call_keeps_the_bound_and_refuses_what_is_not_finite(bound: float | None) -> None:
    def moved(name: str | None) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(pws.mark(nn.Conv2d(3, 8, 3), gain="linear"), nn.Flatten(), pws.mark(nn.Linear(72, 5)))
        optimizer = pws.optim.SGD(model, lr=0.3, momentum=0.9, weight_decay=1e-3, step_bound=bound)
        with pws.kernels.use(name):
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.ones(2, 3, 5, 5)).square().sum().backward()
                optimizer.step()
            before = [p.detach().clone() for p in model.parameters()]
            for p in model.parameters():
                p.grad = torch.full_like(p, torch.inf)
            with pytest.raises(pws.optim.NonFiniteGradientError):
                optimizer.step()
        for parameter, value in zip(model.parameters(), before, strict=True):
            assert torch.equal(parameter, value)
        return before

    for fused, wanted in zip(moved("cpu"), moved("reference"), strict=True):
        assert_close(fused, wanted, "trajectory float32")
