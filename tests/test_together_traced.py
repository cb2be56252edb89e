"""`standardize_together` in compiled and exported programs and in CUDA graphs."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from backends import INTERPRETED
from together_model import assert_same, model_of, results
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend

import pws
from pws import kernels


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


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_has_none_of_our_operators(backend: str, images: Tensor, strict: bool) -> None:
    model = model_of(backend)
    pws.standardize_together(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as: side effects in the forward pass
        exported = torch.export.export(model, (images,), strict=strict)
    assert not [node for node in exported.graph.nodes if "pws" in str(node.target)]
    assert_same([exported.module()(images)], [model(images)])


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
