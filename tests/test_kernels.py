"""The kernel backends against the float64 reference, through autograd, and what they promise beside numbers."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from backends import HERE, INTERPRETED, device_of
from tolerances import assert_close
from torch import Tensor
from torch.autograd import grad
from torch.utils._python_dispatch import TorchDispatchMode

import pws
from pws import kernels
from pws.kernels import registry
from pws.kernels.operators import standardize_rows, standardize_rows_backward

SHAPES = [(1, 2), (3, 9), (64, 27), (7, 1023), (5, 4608), (2, 25088)]
SHAPES += [(40, 9)] if INTERPRETED else [(4096, 2), (4096, 9), (64, 4608)]  # the last is written past the caches
TOGETHER = [str(Path(__file__).with_name(f"test_together{part}.py")) for part in ("", "_traced")]
HALF = (torch.bfloat16, torch.float16)


def row_of(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return "bfloat16 cut" if INTERPRETED and dtype == torch.bfloat16 else name


def assert_matches_the_reference(
    weight: Tensor, alpha: Tensor | None, g: Tensor, row: str, gamma: float = 1e-3
) -> None:
    """Kernel and gradients against the reference, on the same numbers."""
    leaves = [t.requires_grad_() for t in (weight, alpha) if t is not None]
    ours = pws.standardize(weight, alpha, gain=reference.RELU_GAIN, gamma=gamma)
    assert_close(ours.cpu(), reference.kernel(weight.cpu(), None if alpha is None else alpha.cpu(), gamma=gamma), row)
    published = reference.gradients(weight.cpu(), None if alpha is None else alpha.cpu(), g.cpu(), gamma=gamma)
    for mine, formula, leaf in zip(grad(ours, leaves, g), published, leaves, strict=False):
        assert mine.dtype == leaf.dtype
        scale = formula.abs().max().clamp(min=1.0)
        assert_close(mine.cpu().double() / scale, formula / scale, row)


@pytest.mark.parametrize("with_alpha", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32(backend: str, shape: tuple[int, int], with_alpha: bool) -> None:
    device = device_of(backend)
    weight = torch.randn(shape, device=device) * 0.3 + 0.2
    alpha = torch.randn(shape[0], device=device) + 0.5 if with_alpha else None
    assert_matches_the_reference(weight, alpha, torch.randn(shape, device=device), "kernel float32")


@pytest.mark.parametrize("backend", [name for name in HERE if name != "cpu"], indirect=True)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", [(3, 9), (7, 1023), (2, 9000)], ids=str)
def test_half_precision_weights(backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    device = device_of(backend)
    weight, g = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    assert_matches_the_reference(weight, torch.randn(shape[0], device=device).to(dtype), g, row_of(dtype))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_kernel_in_autocasts_dtype(backend: str, dtype: torch.dtype) -> None:
    device = device_of(backend)
    weight, alpha = torch.randn(6, 50, device=device).requires_grad_(), torch.randn(6, device=device).requires_grad_()
    with torch.autocast(device, dtype):
        kernel = pws.standardize(weight, alpha, gain=reference.RELU_GAIN)
    assert kernel.dtype == dtype
    assert_close(kernel.cpu(), reference.kernel(weight.cpu(), alpha.cpu()), row_of(dtype))
    g = torch.randn_like(kernel)
    for mine, formula in zip(
        grad(kernel, [weight, alpha], g), reference.gradients(weight.cpu(), alpha.cpu(), g.cpu()), strict=True
    ):
        assert_close(mine.cpu(), formula, "kernel float32")


def test_a_mean_of_a_thousand_deviations(backend: str) -> None:
    weight = torch.randn(8, 4608, device=device_of(backend)) * 1e-2 + 10
    kernel = pws.standardize(weight, gain=reference.RELU_GAIN, gamma=0.0) * 4608**0.5
    assert_close(kernel.cpu(), reference.kernel(weight.cpu(), gamma=0.0) * 4608**0.5, "large mean")


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0])
def test_constant_filters_have_kernel_zero(backend: str, value: float) -> None:
    weight = torch.full((4, 288), value, device=device_of(backend))
    assert_close(pws.standardize(weight).cpu(), torch.zeros(4, 288), "kernel float32")


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "strided"])
def test_layouts(backend: str, layout: str) -> None:
    device = device_of(backend)
    base = torch.randn(6, 8, 3, 3, device=device)
    weight = {
        "transposed": base.transpose(0, 1),
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "strided": base[:, ::2],
    }[layout].detach()
    alpha = torch.randn(weight.shape[0], 2, device=device)[:, 0]
    assert_matches_the_reference(weight, alpha, torch.randn_like(weight), "kernel float32")


def test_bitwise_equal_from_run_to_run_and_for_any_number_of_threads(backend: str) -> None:
    weight, alpha = torch.randn(64, 4608, device=device_of(backend)), torch.randn(64, device=device_of(backend))
    g = torch.randn_like(weight)
    threads = torch.get_num_threads()
    seen = []
    try:
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            leaves = [weight.clone().requires_grad_(), alpha.clone().requires_grad_()]
            kernel = pws.standardize(*leaves)
            seen.append([kernel.detach(), *grad(kernel, leaves, g)])
    finally:
        torch.set_num_threads(threads)
    same = seen[:2] if backend == "aten" else seen  # torch's own sums may depend on the number of threads
    assert all(torch.equal(a, b) for run in same[1:] for a, b in zip(same[0], run, strict=True))


@pytest.mark.parametrize("operator", [standardize_rows, standardize_rows_backward])
def test_opcheck(backend: str, operator: torch.library.CustomOpDef) -> None:
    device = device_of(backend)
    weight, alpha = torch.randn(5, 9, device=device), torch.randn(5, device=device)
    if operator is standardize_rows:
        for some in (alpha.requires_grad_(), None):
            torch.library.opcheck(operator, (weight.requires_grad_(), some, 0.5, 1e-3, torch.float32))
    else:
        rows = (torch.randn(5, device=device), torch.rand(5, device=device))
        torch.library.opcheck(operator, (torch.randn_like(weight), weight, alpha, *rows, 0.5))


def test_the_operators_autograd_is_the_functions() -> None:
    weight, alpha = torch.randn(5, 9).requires_grad_(), torch.randn(5).requires_grad_()
    g = torch.randn(5, 9)
    kernel = standardize_rows(weight, alpha, reference.RELU_GAIN / 3, 1e-3, torch.float32)[0]
    for mine, formula in zip(grad(kernel, [weight, alpha], g), reference.gradients(weight, alpha, g), strict=True):
        assert_close(mine, formula, "kernel float32")


def test_many_threads_at_once() -> None:
    """Autograd runs backward passes in threads of its own."""
    weight, g = torch.randn(64, 4608), torch.randn(64, 4608)

    def run(results: list[Tensor]) -> None:
        for _ in range(20):
            leaf = weight.clone().requires_grad_()
            kernel = pws.standardize(leaf)
            results.extend([kernel.detach(), *grad(kernel, [leaf], g)])

    seen: list[list[Tensor]] = [[] for _ in range(4)]
    workers = [threading.Thread(target=run, args=(results,)) for results in seen]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [len(results) for results in seen] == [40] * 4
    assert all(torch.equal(seen[0][i % 2], result) for results in seen for i, result in enumerate(results))


def _in_a_child(queue: multiprocessing.Queue[float]) -> None:
    torch.set_num_threads(1)  # as a data loader's worker does: OpenMP's threads do not survive a fork, torch's or ours
    queue.put(float(pws.standardize(torch.ones(64, 4608).cumsum(1)).square().sum()))


@pytest.mark.skipif(INTERPRETED, reason="for the backend with threads")
def test_memory_is_used_again_and_only_when_nobody_holds_it() -> None:
    with kernels.use("cpu"):
        kernels.empty_cache()
        weight = torch.randn(64, 1024)
        first = pws.standardize(weight)
        address, values = first.data_ptr(), first.clone()
        view = first[1:]
        del first
        second = pws.standardize(weight * -1)
        assert second.data_ptr() != address
        assert torch.equal(view, values[1:])
        del view
        assert pws.standardize(weight).data_ptr() == address
        kernels.empty_cache()


@pytest.mark.skipif(INTERPRETED, reason="for the backend with threads")
@pytest.mark.parametrize("entries", [4608, 4609])
def test_a_filter_whose_first_entries_are_outliers(entries: int) -> None:
    """The pass starts from a guess at the mean, made from them."""
    weight = torch.randn(64, entries) * 1e-2
    weight[:, :8] += torch.tensor([1.0, 30.0, -30.0, 1000.0])[torch.arange(64) % 4, None]
    with kernels.use("cpu"):
        assert_matches_the_reference(weight, None, torch.randn(64, entries), "kernel float32")


@pytest.mark.skipif(INTERPRETED, reason="for the backend with threads")
def test_dispatch_modes_see_the_operator() -> None:
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        pws.standardize(torch.randn(4, 5))
    assert "pws.standardize.default" in seen


@pytest.mark.skipif(INTERPRETED, reason="for the backend with threads")
def test_a_forked_process_standardizes() -> None:
    """As a data loader's worker would: the parent's threads are not there."""
    with kernels.use("cpu"):
        expected = float(pws.standardize(torch.ones(64, 4608).cumsum(1)).square().sum())
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=_in_a_child, args=(queue,))
        child.start()
        assert queue.get(timeout=60) == expected
        child.join(60)
    assert child.exitcode == 0


@pytest.mark.skipif(INTERPRETED, reason="the interpreter serves the CPU")
def test_the_choice_by_device_and_dtype() -> None:
    assert registry.choose(torch.ones(2, 2)).name == "cpu"
    assert registry.choose(torch.ones(2, 2, dtype=torch.float64)).name == "aten"
    assert registry.choose(torch.ones(2, 2, dtype=torch.bfloat16)).name == "aten"
    with kernels.use("aten"):
        assert registry.choose(torch.ones(2, 2)).name == "aten"
        with kernels.use(None):
            assert registry.choose(torch.ones(2, 2)).name == "cpu"
    assert registry.choose(torch.ones(2, 2)).name == "cpu"


@pytest.mark.skipif(INTERPRETED, reason="the interpreter serves the CPU")
@pytest.mark.parametrize(
    ("name", "dtype"), [("triton", torch.float32), ("cpu", torch.float64), ("cpu", torch.bfloat16)]
)
def test_a_backend_that_cannot_serve_says_so(name: str, dtype: torch.dtype) -> None:
    with kernels.use(name), pytest.raises(pws.PwsError, match=f"backend {name} was asked for, but it serves float32"):
        pws.standardize(torch.ones(3, 4, dtype=dtype))


def test_an_unknown_backend_is_refused_with_the_nearest() -> None:
    with (
        pytest.raises(pws.PwsError, match=r"unknown kernel backend 'tritn'; did you mean triton\?"),
        kernels.use("tritn"),
    ):
        pass


def test_without_numba_the_choice_is_aten_and_asking_for_it_fails() -> None:
    code = """
import sys
sys.modules["numba"] = None
import torch, pws
from pws.kernels import registry
assert registry.choose(torch.ones(2, 2)).name == "aten"
pws.standardize(torch.randn(3, 4))
try:
    pws.kernels.use("cpu").__enter__()
except pws.PwsError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "the kernel backend cpu can't be imported" in done.stdout
    assert "pip install 'pws-torch[kernels]'" in done.stdout


@pytest.mark.skipif(INTERPRETED, reason="this is that run")
def test_the_triton_kernels_in_tritons_interpreter() -> None:
    """The tests above once more, for triton on the CPU: the interpreter has to be there when triton is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, *TOGETHER],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_the_defaults_for_new_tensors_are_not_for_kernels(backend: str, default: torch.dtype) -> None:
    device = device_of(backend)
    weight, alpha = torch.randn(6, 9, device=device), torch.rand(6, device=device)
    g = torch.randn_like(weight)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            leaves = [weight.requires_grad_(), alpha.requires_grad_()]
            kernel = pws.standardize(*leaves, gain=reference.RELU_GAIN)
            grads = grad(kernel, leaves, g)
    finally:
        torch.set_default_dtype(before)
    assert kernel.dtype == torch.float32
    assert_close(kernel.cpu(), reference.kernel(weight.cpu(), alpha.cpu()), "kernel float32")
    for mine, formula in zip(grads, reference.gradients(weight.cpu(), alpha.cpu(), g.cpu()), strict=True):
        assert_close(mine.cpu(), formula, "kernel float32")
