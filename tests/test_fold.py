"""Folding: the same function, of plain layers, without a trace of pws."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from timm.layers import Conv2dSame
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import pws
from pws.methods import build_method
from pws.models import build_model
from pws.surgery.standardized import to_layers

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: pws.Conv1d(4, 6, 3, stride=2, padding=1, padding_mode="circular"), (2, 4, 9)),
    "conv2d": (lambda: pws.Conv2d(4, 6, 3, groups=2, dilation=2, bias=False), (2, 4, 9, 9)),
    "conv3d": (lambda: pws.Conv3d(2, 3, 3, gain="silu", relative_gamma=True), (2, 2, 4, 4, 4)),
    "transposed": (lambda: pws.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1), (2, 4, 5, 5)),
    "linear": (lambda: pws.Linear(5, 3), (2, 5)),
}


def shaken(model: nn.Module) -> nn.Module:
    """Trained, as it were: no parameter at its initial value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_folds_to_its_parent(name: str) -> None:
    build, shape = LAYERS[name]
    layer, x = shaken(build()), torch.randn(shape)
    folded = pws.fold(layer)
    assert type(folded).__module__.startswith("torch.nn.")
    assert folded.extra_repr() == type(folded).extra_repr(layer).split(", gamma=")[0]
    assert_close(folded(x), layer(x), "float32")
    assert set(dict(folded.named_parameters())) == set(dict(layer.named_parameters())) - {"alpha"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precisions(dtype: torch.dtype) -> None:
    model = shaken(nn.Sequential(pws.Conv2d(3, 4, 3), nn.ReLU(), pws.Conv2d(4, 2, 1))).to(dtype)
    x = torch.randn(1, 3, 6, 6, dtype=dtype)
    folded = pws.fold(model)
    assert {p.dtype for p in folded.parameters()} == {dtype}
    assert torch.equal(folded(x), model(x))


@pytest.mark.parametrize("form", ["optimizer", "layers"])
@pytest.mark.parametrize("name", ["allconv", "preact11", "cifar-resnet18"])
def test_a_network_in_eval_mode(name: str, form: str) -> None:
    model = build_model(name, build_method("pws"), width=0.25).eval()
    if form == "layers":
        to_layers(model)
    shaken(model)
    x = torch.randn(2, 3, 32, 32)
    before, marks = deepcopy(model.state_dict()), pws.marked(model)
    folded = pws.fold(model)
    assert bool(marks) == (form == "optimizer")
    assert pws.marked(folded) == {}
    assert not any(type(module).__module__ == "pws._layers" for module in folded.modules())
    assert_close(folded(x), model(x), "identity float32")
    assert pws.marked(model) == marks
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_what_stays_as_it_was() -> None:
    shared = pws.Linear(4, 4)
    model = nn.Sequential(shared, nn.Dropout(0.5), shared, pws.Linear(4, 2)).eval()
    shared.weight.requires_grad_(False)
    seen: list[Tensor] = []
    model[3].register_forward_hook(lambda _, __, output: seen.append(output))
    model[3].train()
    folded = pws.fold(model)
    assert folded[0] is folded[2]
    assert not folded[0].weight.requires_grad
    assert folded[3].weight.requires_grad
    assert [m.training for m in folded] == [False, False, False, True]
    y = folded(torch.randn(1, 4))
    assert len(seen) == 1
    assert torch.equal(seen[0], y)
    folded[0].weight.data.zero_()
    assert shared.weight.abs().sum() > 0


@pytest.mark.parametrize("form", ["optimizer", "layers"])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_converted_subclass_folds_with_its_requires_grad(frozen: bool, form: str) -> None:
    model = nn.Sequential(Conv2dSame(3, 4, 3), nn.BatchNorm2d(4))
    model[0].weight.requires_grad_(not frozen)
    converted = pws.convert(model, torch.randn(2, 3, 6, 6), form=form)
    folded = pws.fold(converted)
    assert type(folded[0]) is Conv2dSame
    assert folded[0].weight.requires_grad is not frozen
    x = torch.randn(2, 3, 6, 6)
    assert_close(folded(x), converted(x), "float32")


COMPUTED: dict[str, tuple[Callable[[nn.Module], object], Callable[[nn.Module], object]]] = {
    "pruned": (lambda m: prune.l1_unstructured(m, "weight", 0.5), lambda m: prune.remove(m, "weight")),
    "weight norm": (parametrizations.weight_norm, lambda m: parametrize.remove_parametrizations(m, "weight")),
    "parametrized bias": (
        lambda m: parametrize.register_parametrization(m, "bias", nn.Softplus()),
        lambda m: parametrize.remove_parametrizations(m, "bias"),
    ),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_pws_layer_with_a_computed_weight_folds_once_that_is_permanent(name: str) -> None:
    change, make_permanent = COMPUTED[name]
    model, x = nn.Sequential(pws.Conv2d(3, 4, 3)), torch.randn(2, 3, 6, 6)
    change(model[0])
    with pytest.raises(pws.PwsError, match="make it permanent first"):
        pws.fold(model)
    make_permanent(model[0])
    assert_close(pws.fold(model)(x), model(x), "float32")


@pytest.mark.parametrize("name", COMPUTED)
def test_a_marked_layer_with_a_computed_weight_folds_to_itself(name: str) -> None:
    model, x = nn.Sequential(pws.mark(nn.Conv2d(3, 4, 3))), torch.randn(2, 3, 6, 6)
    COMPUTED[name][0](model[0])
    with torch.no_grad():
        model(x)  # else a pruned layer keeps a weight that autograd made
    folded = pws.fold(model)
    assert torch.equal(folded(x), model(x))
    assert pws.marked(folded) == {}


def test_a_model_that_keeps_an_activation_is_refused() -> None:
    model = nn.Sequential(pws.mark(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))
    x = torch.randn(2, 3, 6, 6)
    model[0].seen = model(x)
    for refused in (lambda: pws.fold(model), lambda: pws.plan(model, x)):
        with pytest.raises(pws.PwsError, match=r"keeps something that has no copy.*a tensor that autograd made"):
            refused()
    model[0].seen = model[0].seen.detach()
    assert torch.equal(pws.fold(model)(x), model(x))


def test_a_folded_network_loads_where_pws_is_not_installed(tmp_path: Path) -> None:
    marked = pws.mark(nn.Conv2d(3, 4, 3))
    model = shaken(nn.Sequential(marked, nn.ReLU(), nn.Flatten(), pws.Linear(16, 2)))
    x = torch.randn(1, 3, 4, 4)
    torch.save((pws.fold(model), x, model(x).detach()), tmp_path / "model.pt")
    code = f"""
import sys
sys.modules["pws"] = None
import torch
model, x, y = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
print(float((model(x) - y).abs().max()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert float(done.stdout) < 1e-5
