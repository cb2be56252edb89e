"""The manners of the optimizers: what they refuse and how, and that they are optimizers of torch in everything else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn
from twins import assert_alike, backward, layer_form, mixed, same_bits, snapshot, train

import pws
from pws._mark import mark, mark_of
from pws.optim import SGD, AdamW, NonFiniteGradientError

Make = Callable[[nn.Module], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda model: SGD(model, lr=0.05, momentum=0.9),
    "adamw": lambda model: AdamW(model, lr=0.01),
}
optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.mark.parametrize("cls", [SGD, AdamW])
@pytest.mark.parametrize(
    ("params", "got"),
    [
        (lambda model: model.parameters(), r"a tensor of shape \(8, 3, 3, 3\)"),
        (lambda model: next(model.parameters()), r"a tensor of shape \(8, 3, 3, 3\)"),
        (lambda model: [{"params": list(model.parameters())}], "a dict of params"),
        (lambda model: {"params": list(model.parameters()), "lr": 0.1}, "a dict of params, lr"),
        (lambda model: list(model.named_parameters()), "a tuple"),
        (lambda _: [], "nothing"),
    ],
    ids=["parameters", "a tensor", "plain groups", "a plain group", "named parameters", "nothing"],
)
def test_parameters_that_do_not_tell_what_is_standardized_are_refused(cls: Any, params: Any, got: str) -> None:
    with pytest.raises(pws.PwsError, match=f"takes the model, or groups from pws.param_groups.*; got {got}"):
        cls(params(mixed()[0]), lr=0.1)


@optimizers
def test_a_plain_group_that_joins_is_refused_with_the_remedy(make: Make) -> None:
    optimizer = make(mixed()[0])
    count = len(optimizer.param_groups)
    with pytest.raises(
        pws.PwsError, match=r"got a dict of params. Pass pws.param_groups\(part, lr=...\).*'standardized': F"
    ):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(optimizer.param_groups) == count


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (SGD, {"lr": -1.0}, "lr must be finite and at least 0; got -1.0"),
        (SGD, {"lr": math.nan}, "lr must be finite and at least 0; got nan"),
        (SGD, {"lr": 0.1, "momentum": -0.5}, "momentum must be finite"),
        (SGD, {"lr": 0.1, "weight_decay": math.inf}, "weight_decay must be finite"),
        (SGD, {"lr": 0.1, "nesterov": True}, "nesterov needs a momentum above 0"),
        (SGD, {"lr": 0.1, "step_bound": 0.0}, "step_bound is the longest step .*; got 0.0"),
        (SGD, {"lr": 0.1, "step_bound": math.nan}, "step_bound is the longest step .*; got nan"),
        (AdamW, {"lr": 0.1, "betas": (0.9, 1.0)}, r"betas must be at least 0 and below 1; got \(0.9, 1.0\)"),
        (AdamW, {"lr": 0.1, "eps": -1e-8}, "eps must be finite"),
        (AdamW, {"lr": 0.1, "step_bound": -1}, "step_bound is the longest step .*; got -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(cls: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(pws.PwsError, match=message):
        cls(mixed()[0], **settings)


@optimizers
def test_a_frozen_model_is_refused(make: Make) -> None:
    with pytest.raises(pws.PwsError, match="Linear has no trainable parameter"):
        make(nn.Linear(2, 2).requires_grad_(False))


@optimizers
def test_a_sparse_gradient_is_refused_with_the_remedy(make: Make) -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), mark(nn.Linear(4, 2)))
    optimizer = make(model)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(pws.PwsError, match=r"the gradient of '0.weight' is sparse.*sparse=False"):
        optimizer.step()
    assert same_bits(before, list(model.parameters()))


@optimizers
def test_a_parameter_that_was_replaced_is_refused(make: Make) -> None:
    model, data = mixed()
    optimizer = make(model)
    fresh = nn.Parameter(model[0].weight.detach().clone())
    optimizer.param_groups[0]["params"][0] = model[0].weight = fresh
    backward(model, data[0])
    with pytest.raises(pws.PwsError, match="has taken the place of one that the optimizer was made for"):
        optimizer.step()


@optimizers
@DTYPES
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["0.weight", "5.weight", "10.bias", "2.weight", "3.bias"])
def test_a_gradient_that_is_not_finite_names_its_layer_and_changes_nothing(
    make: Make, dtype: torch.dtype, bad: float, name: str
) -> None:
    model, data = mixed(dtype)
    optimizer = make(model)
    train(model, optimizer, data, 2)
    model.zero_grad()
    backward(model, data[0])
    before = snapshot(model, optimizer)
    model.get_parameter(name).grad.view(-1)[-1] = bad
    shown = "10.weight" if name == "10.bias" else name
    with pytest.raises(
        NonFiniteGradientError, match=f"the gradients of 1 layers hold NaN or infinity .first: '{shown}'."
    ):
        optimizer.step()
    assert same_bits(before, snapshot(model, optimizer))
    model.zero_grad()
    train(model, optimizer, data, 1)
    assert not same_bits(before, snapshot(model, optimizer))


@optimizers
def test_large_half_precision_gradients_are_not_taken_for_infinite(make: Make) -> None:
    """Their length does not fit into float16."""
    model = nn.Sequential(nn.Linear(4, 3), mark(nn.Linear(3, 3, bias=False))).half()
    optimizer = make(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 6e4)
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model[0].weight)


@optimizers
def test_gradients_of_zero_move_nothing(make: Make) -> None:
    model, _ = mixed(torch.float32)
    for group in (optimizer := make(model)).param_groups:
        group["weight_decay"] = 0.0
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    for one, other in zip(before, model.parameters(), strict=True):
        assert_close(one, other, "float32")


@optimizers
def test_a_step_without_any_gradient_does_nothing(make: Make) -> None:
    model, _ = mixed()
    optimizer = make(model)
    before = snapshot(model, optimizer)
    optimizer.step()
    assert same_bits(before, snapshot(model, optimizer))


@optimizers
def test_a_closure_is_called_with_gradients_on_and_its_loss_returned(make: Make) -> None:
    model, data = mixed()
    twin, _ = mixed()
    twin.load_state_dict(model.state_dict())
    one, other = make(model), make(twin)

    def closure() -> Tensor:
        one.zero_grad()
        return backward(model, data[0])

    loss = one.step(closure)
    assert loss == backward(twin, data[0])
    other.step()
    assert same_bits(list(model.parameters()), list(twin.parameters()))


@optimizers
def test_hooks_are_called_around_the_step(make: Make) -> None:
    model, data = mixed()
    optimizer = make(model)
    weight = model[0].weight.detach().clone()
    seen: list[tuple[str, bool]] = []
    before = optimizer.register_step_pre_hook(lambda *_: seen.append(("pre", torch.equal(weight, model[0].weight))))
    optimizer.register_step_post_hook(lambda *_: seen.append(("post", torch.equal(weight, model[0].weight))))
    train(model, optimizer, data, 1)
    before.remove()
    train(model, optimizer, data, 1)
    assert seen == [("pre", True), ("post", False), ("post", False)]


@optimizers
def test_gradients_that_are_set_to_zero_serve_again(make: Make) -> None:
    model, data = mixed()
    twin, _ = mixed()
    twin.load_state_dict(model.state_dict())
    one, other = make(model), make(twin)
    for i in range(6):
        one.zero_grad(set_to_none=False)
        other.zero_grad()
        for net, optimizer in ((model, one), (twin, other)):
            backward(net, data[i % 4])
            optimizer.step()
    assert same_bits(snapshot(model, one), snapshot(twin, other))


@optimizers
def test_gradients_in_any_memory_layout_are_read_right(make: Make) -> None:
    model, data = mixed(torch.float32)
    twin, _ = mixed(torch.float32)
    twin.load_state_dict(model.state_dict())
    one, other = make(model), make(twin)
    for i in range(6):
        for net, optimizer in ((model, one), (twin, other)):
            optimizer.zero_grad()
            backward(net, data[i % 4])
            if net is model:
                for parameter in net.parameters():
                    parameter.grad = strided(parameter.grad, i)
            optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(a, b, "trajectory float32")


def strided(tensor: Tensor, i: int) -> Tensor:
    """The same values, every other one in memory, or with the dimensions in another order."""
    if i % 2 or tensor.dim() == 1:
        return torch.stack([tensor, torch.full_like(tensor, 7.0)], dim=-1)[..., 0]
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


@optimizers
def test_a_grad_scaler_unscales_skips_and_goes_on(make: Make) -> None:
    model = nn.Sequential(mark(nn.Conv2d(3, 8, 3)), nn.Tanh(), nn.Flatten(), nn.Linear(72, 6), mark(nn.Linear(6, 3)))
    optimizer = make(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    data = [(torch.randn(6, 3, 5, 5), torch.randint(3, (6,))) for _ in range(4)]
    losses = []
    for i in range(25):
        optimizer.zero_grad()
        before = snapshot(model, optimizer)
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.cross_entropy(model(data[i % 4][0]).float(), data[i % 4][1])
        scaler.scale(loss).backward()
        if i == 3:
            model[0].weight.grad[0, 0, 0, 0] = math.inf
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        assert same_bits(before, snapshot(model, optimizer)) == (i == 3)
        assert (scaler.get_scale() < scale) == (i == 3)
        losses.append(float(loss.detach()))
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_a_scaled_loss_gives_the_unscaled_steps() -> None:
    model, data = mixed()
    twin = layer_form(model)
    ours = SGD(model, lr=0.1, momentum=0.9, step_bound=None)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(6):
        ours.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(data[i % 4][0]), data[i % 4][1])).backward()
        scaler.step(ours)
        scaler.update()
    train(twin, theirs, data, 6)
    assert_alike(model, ours, twin)


@optimizers
@DTYPES
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "2.weight", "5.weight", "5.bias"])
def test_a_backward_pass_through_an_older_graph_is_torchs_error(make: Make, dtype: torch.dtype, name: str) -> None:
    """Autograd must notice that what it saved has changed."""
    model, data = mixed(dtype)
    optimizer = make(model)
    train(model, optimizer, data, 1)
    loss = model.get_parameter(name).square().sum()
    train(model, optimizer, data, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@optimizers
def test_new_tensors_follow_the_parameters_whatever_the_defaults(make: Make) -> None:
    model, data = mixed(torch.float32)
    optimizer = make(model)
    torch.set_default_dtype(torch.float64)
    try:
        optimizer.zero_grad()
        backward(model, data[0])
        with torch.device("meta"):
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    for state in optimizer.state.values():
        assert all(value.device.type == "cpu" and value.dtype == torch.float32 for value in state.values())


@optimizers
def test_an_average_of_centred_kernels_is_centred(make: Make) -> None:
    model, data = mixed()
    optimizer = make(model)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    for i in range(8):
        train(model, optimizer, [data[i % 4]], 1)
        averaged.update_parameters(model)
    layer = averaged.module[0]
    assert mark_of(layer) is not None
    assert_close(layer.weight.flatten(1).mean(1), torch.zeros(8), "float64")
    assert not torch.equal(layer.weight, model[0].weight)


@optimizers
def test_a_bias_that_is_not_one_number_per_filter_in_a_row_moves_right(make: Make) -> None:
    """A view of every other number of something else."""
    outer = torch.zeros(2 * 8)
    model, data = mixed(torch.float32)
    twin, _ = mixed(torch.float32)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        outer[::2].copy_(model[0].bias)
    model[0].bias = nn.Parameter(outer[::2])
    assert not model[0].bias.is_contiguous()
    one, other = make(model), make(twin)
    one.step_bound = other.step_bound = None
    train(model, one, data, 5)
    train(twin, other, data, 5)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(a, b, "trajectory float32")
    assert not outer[1::2].any()
