"""`pws.param_groups`: who decays, at which rate, and that every optimizer takes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import LayerNorm2d, ScaledStdConv2d
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import pws

RATES = {"lr": 0.1, "weight_decay": 0.01, "scale_lr_factor": 0.25}


class Gained(nn.Module):
    """A gain of no dimension, as in `LayerScale` of a whole branch."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))


class Net(nn.Module):
    """A parameter of every kind, in a model nested a level deep."""

    def __init__(self) -> None:
        super().__init__()
        self.ours = nn.Sequential(pws.Conv2d(3, 4, 3), pws.ConvTranspose2d(4, 4, 3), pws.Linear(4, 4, bias=False))
        self.plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4))
        self.norms = nn.Sequential(
            *(
                nn.BatchNorm2d(4),
                nn.GroupNorm(2, 4),
                nn.LayerNorm(4),
                nn.InstanceNorm2d(4, affine=True),
                LayerNorm2d(4),
            ),
            *(nn.LayerNorm([4, 5, 5]), nn.RMSNorm([4, 5])),
        )
        self.gains = nn.Sequential(ScaledStdConv2d(3, 4, 3), weight_norm(nn.Conv2d(3, 4, 3)), nn.PReLU(4), Gained())
        self.embedding = nn.Embedding(7, 4)


def names_by_group(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}


def test_who_is_in_which_group() -> None:
    net = Net()
    found = names_by_group(net, pws.param_groups(net, **RATES))
    magnitude, direction = (f"gains.1.parametrizations.weight.original{i}" for i in range(2))
    assert found["scales"] == {"ours.0.alpha", "ours.0.bias", "ours.1.alpha", "ours.1.bias", "ours.2.alpha"}
    assert found["weights"] == {
        *("ours.0.weight", "ours.1.weight", "ours.2.weight", "plain.0.weight", "plain.1.weight"),
        *("gains.0.weight", direction, "embedding.weight"),
    }
    assert found["no_decay"] == {
        *(name for name, _ in net.named_parameters() if name.startswith("norms.")),
        *("plain.0.bias", "plain.1.bias", "gains.0.bias", "gains.0.gain", "gains.1.bias", magnitude),
        *("gains.2.weight", "gains.3.gain"),
    }
    assert net.gains[0].gain.shape == (4, 1, 1, 1), "timm's gain has the shape that others let decay"
    assert sum(map(len, found.values())) == len(list(net.parameters()))


@pytest.mark.parametrize(
    "build",
    [
        lambda: weight_norm(nn.Linear(4, 3)),
        lambda: weight_norm(nn.Conv1d(4, 3, 2)),
        lambda: weight_norm(nn.Linear(4, 3), dim=None),
    ],
    ids=["linear", "conv1d", "one magnitude a layer"],
)
def test_magnitudes_of_weight_norm_do_not_decay(build: Callable[[], nn.Module]) -> None:
    net = build()
    found = names_by_group(net, pws.param_groups(net, lr=1))
    magnitude, direction = (f"parametrizations.weight.original{i}" for i in range(2))
    assert found == {"no_decay": {"bias", magnitude}, "weights": {direction}}


def marked_net() -> nn.Module:
    return nn.Sequential(
        *(pws.mark(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), pws.mark(nn.ConvTranspose2d(4, 4, 3, groups=2, bias=False))),
        *(nn.Linear(4, 4), nn.Sequential(pws.mark(nn.Linear(4, 2), gain="linear"))),
    )


def test_biases_of_marked_layers_are_scales_and_their_weights_decay() -> None:
    net = marked_net()
    found = names_by_group(net, pws.param_groups(net, **RATES))
    assert found == {
        "weights": {"0.weight", "2.weight", "3.weight", "4.0.weight"},
        "scales": {"0.bias", "4.0.bias"},
        "no_decay": {"1.weight", "1.bias", "3.bias"},
    }


def test_the_groups_of_marked_layers_tell_what_an_optimizer_of_pws_needs() -> None:
    net = marked_net()
    weights, scales, no_decay = pws.param_groups(net, **RATES)
    assert weights["scale_lr_factor"] == 0.25, "alpha's rate, which is in no group, follows the weight's"
    assert "scale_lr_factor" not in no_decay
    members = {member.name: member for group in (weights, scales, no_decay) for member in group.members.values()}
    assert set(members) == {name for name, _ in net.named_parameters()}
    assert members["0.weight"].mark == net[0].pws
    assert members["0.bias"].mark is members["3.weight"].mark is None
    assert {name: member.transposed for name, member in members.items() if member.transposed} == {"2.weight": 2}
    assert {member.layer for member in members.values()} == {"0", "1", "2", "3", "4.0"}
    assert weights.layers is scales.layers
    assert weights.layers["0"] == dict(net[0].named_parameters())


def test_marked_layers_that_share_a_weight_must_standardize_it_alike() -> None:
    one, other = pws.mark(nn.Linear(4, 4)), nn.Linear(4, 4)
    other.weight = one.weight
    net = nn.Sequential(one, other)
    with pytest.raises(
        pws.PwsError, match=r"layers that share a weight must standardize it alike; '0.weight' has Mark\(.* None"
    ):
        pws.param_groups(net, lr=1)
    pws.mark(other, gain="tanh")
    with pytest.raises(pws.PwsError, match="Mark both with the same settings, or neither"):
        pws.param_groups(net, lr=1)
    pws.mark(other)
    assert sum(len(group["params"]) for group in pws.param_groups(net, lr=1)) == 3


def test_the_weight_of_a_frozen_marked_layer_is_left_out_and_its_bias_is_not() -> None:
    net = marked_net()
    net[0].weight.requires_grad_(False)
    assert names_by_group(net, pws.param_groups(net, lr=1))["scales"] == {"0.bias", "4.0.bias"}


def test_rates() -> None:
    told = {group["name"]: (group["lr"], group["weight_decay"]) for group in pws.param_groups(Net(), **RATES)}
    assert told == {"weights": (0.1, 0.01), "scales": (0.025, 0.0), "no_decay": (0.1, 0.0)}
    plain = {group["name"]: (group["lr"], group["weight_decay"]) for group in pws.param_groups(Net(), lr=0.3)}
    assert plain == {"weights": (0.3, 0.0), "scales": (0.3, 0.0), "no_decay": (0.3, 0.0)}


def test_shared_parameters_are_there_once() -> None:
    conv, twin = pws.Conv2d(4, 4, 3), pws.Conv2d(4, 4, 3)
    twin.weight = conv.weight
    net = nn.Sequential(conv, nn.ReLU(), conv, twin)
    parameters = [id(p) for group in pws.param_groups(net, lr=1) for p in group["params"]]
    assert len(parameters) == len(set(parameters)) == 5
    assert set(parameters) == {id(p) for p in net.parameters()}


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    net = nn.Sequential(pws.Conv2d(3, 4, 3), pws.Conv2d(4, 4, 3))
    net[0].requires_grad_(False)
    net[1].alpha.requires_grad_(False)
    assert names_by_group(net, pws.param_groups(net, lr=1)) == {"weights": {"1.weight"}, "scales": {"1.bias"}}
    net[1].bias.requires_grad_(False)
    assert names_by_group(net, pws.param_groups(net, lr=1)) == {"weights": {"1.weight"}}


NO_GROUPS = {
    "LBFGS": "takes no parameter groups",
    "SparseAdam": "takes sparse gradients alone",
    "Muon": "takes 2-D parameters alone",
}
OPTIMIZERS = [
    name
    for name, value in vars(torch.optim).items()
    if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
]


def test_the_optimizers_are_really_listed() -> None:
    assert {"SGD", "Adam", "AdamW", "RMSprop", "Adagrad"} <= set(OPTIMIZERS)
    assert len(set(OPTIMIZERS) - set(NO_GROUPS)) >= 12


def small() -> nn.Module:
    return nn.Sequential(pws.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))


def step(net: nn.Module, name: str, scale_lr_factor: float) -> dict[str, bool]:
    """Whether each parameter moved in two steps."""
    before = {key: value.detach().clone() for key, value in net.named_parameters()}
    groups = pws.param_groups(net, lr=0.1, weight_decay=0.01, scale_lr_factor=scale_lr_factor)
    optimizer = getattr(torch.optim, name)(groups)
    for _ in range(2):
        optimizer.zero_grad()
        loss: Tensor = net(torch.randn(4, 3, 6, 6)).square().mean()
        loss.backward()
        optimizer.step()
    return {key: not torch.equal(value, before[key]) for key, value in net.named_parameters()}


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in NO_GROUPS])
def test_every_optimizer_moves_every_parameter(name: str) -> None:
    assert all(step(small(), name, scale_lr_factor=1).values())


# Rprop's learning rate is the length of its first step alone: it has a smallest step, and 0 is below it.
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in {*NO_GROUPS, "Rprop"}])
def test_every_optimizer_takes_each_groups_rate(name: str) -> None:
    moved = step(small(), name, scale_lr_factor=0)
    assert moved == {key: key not in ("0.alpha", "0.bias") for key in moved}


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("argument", ["lr", "weight_decay", "scale_lr_factor"])
def test_rates_outside_their_range_are_refused(argument: str, value: float) -> None:
    with pytest.raises(pws.PwsError, match=f"{argument} must be finite and at least 0; got {value!r}"):
        pws.param_groups(Net(), **(RATES | {argument: value}))


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)], ids=["empty", "frozen"])
def test_a_model_with_nothing_to_train_is_refused(model: nn.Module) -> None:
    with pytest.raises(pws.PwsError, match=f"{type(model).__name__} has no trainable parameter"):
        pws.param_groups(model, lr=1)
