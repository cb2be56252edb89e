"""`pws.mark`: what can be marked, that a mark is the layer's for good, and how a weight is taken apart into `w` and alpha."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from copy import copy, deepcopy

import pytest
import reference
import torch
from tolerances import assert_close
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from twins import kinds

import pws
from pws._mark import Mark, adopt, filters_of, mark, mark_of, marked, unmark


class Own(nn.Conv2d):
    """A subclass that computes with its weight."""


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_of_layer_can_be_marked_and_stays_what_it_is(kind: str) -> None:
    layer = kinds()[kind][0]()
    cls, keys, weight = type(layer), set(layer.state_dict()), layer.weight.detach().clone()
    assert mark(layer, gain=2.0, gamma=0.1, relative_gamma=True) is layer
    assert layer.pws == Mark(2.0, 0.1, True)
    assert type(layer) is cls
    assert set(layer.state_dict()) == keys
    assert torch.equal(layer.weight, weight)


def test_the_defaults_are_the_layers() -> None:
    layer, ours = mark(nn.Linear(3, 2)), pws.Linear(3, 2)
    assert layer.pws == Mark(ours.gain, ours.gamma, ours.relative_gamma)
    assert_close(layer.pws.gain, reference.RELU_GAIN, "quadrature")


def test_a_subclass_can_be_marked_and_a_mark_replaced() -> None:
    layer = mark(mark(Own(3, 4, 3)), gain=1.0)
    assert mark_of(layer) == Mark(1.0)


@pytest.mark.parametrize("kind", ["conv2d groups", "transposed groups", "transposed 2d", "linear"])
def test_reset_parameters_draws_the_kernel_of_kaimings_filters(kind: str) -> None:
    layer = kinds()[kind][0]()
    mark(layer, gain=1.5, gamma=0.0, reset_parameters=True)
    filters = filters_of(layer, layer.weight).flatten(1)
    assert_close(filters.mean(1), torch.zeros(len(filters)), "float32")
    assert_close(filters.square().mean(1), torch.full((len(filters),), 1.5**2 / filters.shape[1]), "float32")
    assert not layer.bias.any()


def test_reset_parameters_keeps_dtype_and_layout() -> None:
    layer = nn.Conv2d(4, 8, 3).to(torch.bfloat16).to(memory_format=torch.channels_last)
    mark(layer, reset_parameters=True)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "copied",
    [deepcopy, copy, lambda layer: pickle.loads(pickle.dumps(layer)), nn.Module.double, nn.Module.bfloat16],
    ids=["deepcopy", "copy", "pickle", "double", "bfloat16"],
)
def test_a_mark_survives(copied: Callable[[nn.Module], nn.Module]) -> None:
    assert mark_of(copied(mark(nn.Linear(3, 2), gain=1.0))) == Mark(1.0)


def test_a_mark_survives_saving_a_whole_model_and_loading_a_state_dict() -> None:
    model = nn.Sequential(mark(nn.Linear(3, 2), gain=1.0), nn.Linear(2, 2))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert marked(torch.load(file, weights_only=False)) == {"0": Mark(1.0)}
    model.load_state_dict(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).state_dict())
    assert marked(model) == {"0": Mark(1.0)}


def test_marked_and_unmark_reach_every_depth() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(mark(nn.Linear(3, 2), gain=1.0)), "b": nn.Linear(2, 2)})
    model["c"] = mark(nn.Conv1d(2, 2, 3), gain=2.0, gamma=0.0)
    assert marked(model) == {"a.0": Mark(1.0), "c": Mark(2.0, 0.0)}
    unmark(model)
    assert marked(model) == {}
    unmark(model)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (lambda: nn.BatchNorm2d(3), "got a BatchNorm2d"),
        (lambda: nn.Embedding(3, 4), "got a Embedding"),
        (lambda: nn.Bilinear(3, 4, 5), "got a Bilinear"),
        (lambda: nn.Sequential(nn.Linear(3, 2)), "got a Sequential"),
        (lambda: pws.Conv2d(3, 4, 3), "got a Conv2d, which standardizes its weight itself"),
        (lambda: weight_norm(nn.Linear(3, 2)), "whose weight is computed from other parameters"),
        (lambda: spectral_norm(nn.Conv2d(3, 2, 3)), "whose weight is computed from other parameters"),
        (lambda: prune.l1_unstructured(nn.Linear(3, 2), "weight", 1), "whose weight is computed from other parameters"),
    ],
)
def test_what_cannot_be_marked_is_refused(layer: Callable[[], nn.Module], why: str) -> None:
    module = layer()
    with pytest.raises(pws.PwsError, match=f"{why}.*Mark the plain layers"):
        mark(module)
    assert mark_of(module) is None


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [
        (lambda: nn.Conv2d(4, 4, 1, groups=4), 1),
        (lambda: nn.Conv2d(1, 4, 1), 1),
        (lambda: nn.Linear(1, 4), 1),
        (lambda: nn.ConvTranspose2d(1, 4, 1), 1),
        (lambda: nn.ConvTranspose2d(3, 3, 1, groups=3), 1),
    ],
)
def test_filters_of_one_entry_are_refused(layer: Callable[[], nn.Module], fan_in: int) -> None:
    with pytest.raises(pws.ShapeError, match=f"fan-in {fan_in}"):
        mark(layer())


def test_a_transposed_convolution_with_one_output_but_several_inputs_is_not() -> None:
    mark(nn.ConvTranspose2d(4, 1, 1))


@pytest.mark.parametrize("gamma", [-1e-3, math.nan, math.inf])
def test_a_gamma_that_cannot_be_is_refused(gamma: float) -> None:
    with pytest.raises(pws.PwsError, match="gamma is added to a variance"):
        mark(nn.Linear(3, 2), gamma=gamma)


@pytest.mark.parametrize("gain", [0.0, -1.0, math.nan, "reul"])
def test_a_gain_that_cannot_be_is_refused(gain: float | str) -> None:
    with pytest.raises(pws.PwsError, match=r"gain must be a positive|unknown activation 'reul'; did you mean relu"):
        mark(nn.Linear(3, 2), gain=gain)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize("size", [1e-5, 1.0, 1e5])
@pytest.mark.parametrize("shape", [(5, 2), (7, 4, 3, 3), (1, 64)], ids=str)
def test_adopt_is_the_inverse_of_the_formula_but_for_the_means(
    shape: tuple[int, ...], size: float, gamma: float, relative: bool
) -> None:
    kernel = torch.randn(shape, dtype=torch.float64) * size
    w, alpha = adopt(kernel, Mark(1.3, gamma, relative))
    dims = tuple(range(1, kernel.dim()))
    centred = kernel - kernel.mean(dims, keepdim=True)
    again = reference.kernel(w, alpha, gain=1.3, gamma=gamma, relative=relative)
    assert_close(again / size, centred / size, "float64")
    wanted = torch.full(shape[:1], 2 / reference.fan_in(kernel), dtype=torch.float64)
    assert_close(w.square().mean(dims), wanted, "float64")
    assert (alpha > 0).all()


@pytest.mark.parametrize(
    ("given", "found"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_adopt_takes_float32_at_least_and_keeps_the_layout(given: torch.dtype, found: torch.dtype) -> None:
    kernel = torch.randn(4, 4, 3, 3).to(given).to(memory_format=torch.channels_last)
    w, alpha = adopt(kernel, Mark(1.0))
    assert w.dtype == alpha.dtype == found
    assert w.stride() == kernel.stride()


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0])
def test_a_filter_without_variance_gets_alpha_zero_and_a_direction(value: float) -> None:
    kernel = torch.randn(4, 27)
    kernel[1] = value
    w, alpha = adopt(kernel, Mark(1.0))
    assert alpha[1] == 0
    assert (alpha[[0, 2, 3]] > 0).all()
    assert_close(w.square().mean(1), torch.full((4,), 2 / 27), "float32")
    again, _ = adopt(kernel, Mark(1.0))
    assert torch.equal(w, again), "the direction is the same in every process"


def test_filters_of_puts_filters_first_and_back() -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, groups=2)
    filters = filters_of(layer, layer.weight)
    assert filters.shape == (6, 2, 3, 3)
    for o in range(6):
        group, j = divmod(o, 3)
        assert torch.equal(filters[o], layer.weight[2 * group : 2 * group + 2, j])
    assert torch.equal(filters_of(layer, filters), layer.weight)
