"""A warm start: what a trained model computes is kept as closely as filters of mean zero can."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from tolerances import assert_close
from torch import Tensor, nn

import pws
from pws._errors import PwsError
from pws._mark import filters_of
from pws.cli import main
from pws.surgery.nearest import nearest_filters


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module, example: Tensor, *, centred: bool = False) -> nn.Module:
    """With running statistics and affines as after training; with `centred`, filters that the conversion can keep exactly."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(-1.5, 1.5)
                module.bias.normal_()
                module.momentum = None
            elif centred and isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.sub_(module.weight.mean(tuple(range(1, module.weight.dim())), keepdim=True))
        model.train()
        for _ in range(3):
            model(example)
    return model.eval()


def small(first: nn.Module | None = None) -> nn.Sequential:
    first = first or nn.Conv2d(3, 4, 3)
    return nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8))


def test_a_warm_start_is_exact_where_filters_have_no_mean() -> None:
    example = images(16, 3, 16, 16)
    for name in ("resnet18", "resnetv2_18"):  # at a quarter of their width: a fit's time grows with its cube
        model = timm.create_model(name, num_classes=7, channels=(16, 32, 64, 128))
        model = trained(model, example, centred=True)
        plan = pws.plan(model, example, warm_start=True)
        assert plan.fit() < 1e-4
        converted = plan.apply().eval()
        assert not any(isinstance(m, nn.BatchNorm2d) for m in converted.modules())
        assert sum(p.numel() for p in converted.parameters()) == plan.parameters_after
        scale = model(example).std()
        assert_close(converted(example) / scale, model(example) / scale, "identity float32")


@pytest.mark.parametrize(("channels", "length"), [(6, 9), (8, 8)])
def test_a_norm_of_another_axis_than_the_layers_channels_keeps_its_scale_and_shift(channels: int, length: int) -> None:
    """Linear works along the last axis of (N, C, L), BatchNorm1d along C."""
    x = images(64, channels, length)
    layers = [nn.Linear(length, length), nn.BatchNorm1d(channels), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(length, length), nn.BatchNorm1d(channels))
    model = settled(model, x)
    plan = pws.plan(model, x, warm_start=True)
    assert plan.named("affine") == ["1", "4"]
    converted = plan.apply().eval()
    assert_close(converted[:2](x), model[:2](x), "identity float32")
    assert_close(converted[4](x), model[4](x), "identity float32")


def settled(model: nn.Module, x: Tensor) -> nn.Module:
    """With running statistics of `x`, and affines that differ from channel to channel."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.2, 3)
            nn.init.normal_(module.bias)
            module.momentum = None
    with torch.no_grad():
        for _ in range(3):
            model.train()(x)
    return model.eval()


def test_a_norm_of_the_input_keeps_its_scale_and_shift() -> None:
    x = images(512, 20) * torch.logspace(-2, 2, 20) + 5
    model = settled(
        nn.Sequential(nn.BatchNorm1d(20), nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2)), x
    )
    converted = pws.plan(model, x, warm_start=True).apply()
    assert_close(converted[0](x), model[0](x), "identity float32")
    assert not converted[0].weight.requires_grad


class Auxiliary(nn.Module):
    """With a head that runs in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.norm(self.stem(x)).relu()
        return (y.mean((2, 3)), self.head(y)) if self.training else y.mean((2, 3))


def in_training(model: nn.Module, x: Tensor) -> Tensor:
    """What the head gives, with the norms of eval mode."""
    for module in model.train().modules():
        module.training = not isinstance(module, nn.BatchNorm2d)
    outputs: Tensor = model(x)[1]
    return outputs


def test_a_head_that_runs_in_training_only_is_fitted_and_counted() -> None:
    x = images(32, 3, 12, 12)
    model = settled(Auxiliary(), x)
    plan = pws.plan(model, x, warm_start=True)
    wanted, found = in_training(model, x), in_training(plan.apply(), x)
    error = float((found - wanted).detach().double().square().mean().sqrt() / wanted.detach().double().std())
    assert error < 0.2
    # The other output, the stem's, is exact: its mean with the head's error.
    assert plan.fit() == pytest.approx(error, rel=0.01) or plan.fit() == pytest.approx(error / 2, rel=0.01)


def test_a_head_that_runs_in_training_only_is_calibrated() -> None:
    x = images(32, 3, 12, 12)
    converted = pws.convert(Auxiliary(), x).train()
    y = converted.norm(converted.stem(x)).relu()
    assert (converted.head[0](y) - converted.head[0].bias.view(-1, 1, 1)).var().item() == pytest.approx(1, rel=1e-3)


class Found(nn.Sequential):
    """As many outputs as there are positive ones."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x).flatten()
        return y[y > 0]


def test_where_the_number_of_outputs_depends_on_the_data_the_error_is_that_of_the_last_layer() -> None:
    x = images(16, 3, 12, 12).abs()
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)
    model = settled(Found(*layers), x)
    plan = pws.plan(model, x, warm_start=True)
    wanted, found = nn.Sequential(*model)(x), nn.Sequential(*plan.apply().eval())(x)
    error = float((found - wanted).double().square().mean().sqrt() / wanted.double().std())
    assert plan.fit() == pytest.approx(error, rel=1e-3)
    assert f"{100 * error:.3g} %" in str(plan)


class Regions(nn.Module):
    """The head sees the patches that score highest, as that of a detector does."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        )
        self.score = nn.Conv2d(8, 1, 1)
        self.head = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body(x)
        rows = y.movedim(1, -1).flatten(0, 2)
        best = self.score(y).flatten().topk(100).indices
        return self.score(y), self.head(rows[best])


def test_a_head_of_chosen_regions_is_fitted_on_the_regions_that_the_trained_model_chose() -> None:
    x = images(32, 3, 12, 12).abs()
    model = settled(Regions(), x)
    plan = pws.plan(model, x, warm_start=True)
    assert plan.selected >= {"head.0", "head.3"}
    converted = plan.apply().eval()
    rows = model.body(x).movedim(1, -1).flatten(0, 2)
    rows = rows[model.score(model.body(x)).flatten().topk(100).indices]
    wanted, found = model.head(rows), converted.head(rows)
    assert float((found - wanted).detach().square().mean().sqrt() / wanted.detach().std()) < 0.3


def test_a_warm_start_states_its_error() -> None:
    example = images(32, 3, 16, 16).abs()  # of one sign: the means of filters count
    model = trained(small(), example)
    plan = pws.plan(model, example, warm_start=True)
    converted = plan.apply().eval()
    wanted, found = model(example), converted(example)
    error = float((found - wanted).double().square().mean().sqrt() / wanted.double().std())
    assert plan.fit() == pytest.approx(error, rel=1e-3)
    assert 0.001 < error < 0.5
    assert f"warm start: outputs differ by {100 * error:.3g} %" in str(plan)


def test_layers_on_the_input_stay_plain_and_take_over_their_norms() -> None:
    example = images(32, 3, 16, 16).abs()
    for first in (nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(3, 4, 3), Conv2dSame(3, 4, 3), nn.ConvTranspose2d(3, 4, 3)):
        model = trained(small(first), example)
        plan = pws.plan(model, example, warm_start=True)
        assert plan.named("absorb") == ["0"]
        assert plan.named("standardize") == ["3"]
        converted = plan.apply().eval()
        assert type(converted[0]) is type(first)
        assert sum(p.numel() for p in converted.parameters()) == plan.parameters_after
        assert_close(converted[:3](example), model[:3](example), "float32")
        assert {n: p.shape for n, p in plan.apply(calibrate=False).named_parameters()} == {
            n: p.shape for n, p in converted.named_parameters()
        }


def test_a_plain_layer_on_the_input_keeps_other_layers_from_nothing() -> None:
    """In front of a residual stream its norms can't go into it: they stay, as scale and shift."""
    example = images(8, 3, 16, 16)
    model = trained(timm.create_model("resnetv2_18", num_classes=7), example)
    plan = pws.plan(model, example, warm_start=True)
    actions = {step.name: step.action for step in plan.steps}
    assert actions["stem.conv"] == "keep"
    assert actions["stages.0.blocks.0.norm1"] == "affine"


LAYERS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.Linear(12, 6), (40, 12)),
    (lambda: nn.Linear(12, 6), (10, 4, 12)),
    (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (8, 4, 9)),
    (lambda: nn.Conv2d(3, 8, 3, stride=2, padding=2, dilation=2, padding_mode="reflect"), (8, 3, 11, 9)),
    (lambda: nn.Conv2d(6, 6, 3, groups=6), (8, 6, 8, 8)),
    (lambda: Conv2dSame(3, 8, 3, stride=2), (8, 3, 9, 9)),
    (lambda: nn.Conv3d(2, 4, 2), (8, 2, 4, 4, 4)),
    (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), (8, 4, 5, 5)),
]


@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_no_zero_mean_filters_are_nearer(
    build: Callable[[], nn.Module], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The squared distance is convex: it is smallest where its gradient along all filters of mean zero vanishes."""
    monkeypatch.setattr("pws.surgery.nearest.RIDGE", 0.0)
    monkeypatch.setattr("pws.surgery.nearest._ENTRIES", 500)  # in several parts
    torch.manual_seed(0)
    layer, example = build().double(), images(*shape).abs().double()  # of one sign: the means of filters count
    channel = 1 - layer.weight.dim()
    targets = torch.randn(layer(example).shape, dtype=torch.float64)
    trained_OK = filters_of(layer, layer.weight).flatten(1)
    nearest_filters(layer, example, targets.movedim(channel, -1), trained_OK)
    output = layer(example)
    assert_close(output, layer(example), "exact")
    kernel_OK = filters_of(layer, layer.weight).flatten(1)
    assert_close(kernel_OK.mean(1), torch.zeros(len(kernel_OK)), "float64")

    loss = (layer(example) - targets).square().sum()
    along, of_bias = torch.autograd.grad(loss, [layer.weight, layer.bias])
    along_OK = filters_of(layer, along).flatten(1)
    assert (along_OK - along_OK.mean(1, keepdim=True)).abs().max() < 1e-9 * loss
    assert of_bias.abs().max() < 1e-9 * loss
    assert along_OK.mean(1).abs().min() > 1e-6 * loss  # with a mean they could be nearer


@pytest.mark.parametrize("size", [(9, 9), (10, 10)])
@pytest.mark.parametrize("named", [False, True])
def test_a_layer_is_fitted_as_it_is_called(size: tuple[int, int], named: bool) -> None:
    """U-Nets give their transposed convolutions an output_size; some models name the input."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.up = nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1)
            self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(6)])

        def forward(self, x: Tensor) -> Tensor:
            x = self.norms[0](self.first(x)).relu()
            size_ = list(size)
            return self.norms[1](self.up(input=x, output_size=size_) if named else self.up(x, size_))

    example = images(16, 3, 5, 5)
    model = Model()
    with torch.no_grad():
        model.up.weight.sub_(model.up.weight.mean((0, 2, 3), keepdim=True))
    trained(model, example)
    plan = pws.plan(model, example, warm_start=True)
    assert plan.named("standardize") == ["up"]
    assert plan.fit() < 1e-5


@pytest.mark.parametrize("where", ["weight", "running_var"])
def test_a_model_that_is_not_finite_is_refused(where: str) -> None:
    model = trained(small(), images(4, 3, 8, 8))
    broken = model[3].weight if where == "weight" else model[4].running_var
    broken.data.view(-1)[0] = float("nan")
    with pytest.raises(pws.PwsError, match="at layer '3' it is not"):
        pws.plan(model, images(4, 3, 8, 8), warm_start=True).apply()


def test_inputs_that_say_nothing_leave_the_trained_filters() -> None:
    layer = nn.Conv2d(3, 4, 3)
    trained_OK = layer.weight.detach().flatten(1).clone()
    for example in (torch.ones(4, 3, 6, 6), torch.zeros(4, 3, 6, 6)):
        targets = torch.full((4, 4, 4, 4), 2.0)
        nearest_filters(layer, example, targets, trained_OK)
        output = layer(example)
        assert_close(output, targets, "kernel float32")
        assert_close(layer.weight.flatten(1), trained_OK - trained_OK.mean(1, keepdim=True), "kernel float32")


def test_depthwise_layers_stay_plain_and_take_over_their_norms() -> None:
    example = images(16, 3, 16, 16)
    depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8))
    model = trained(nn.Sequential(*small(), nn.ReLU(), depthwise, nn.ReLU(), nn.Conv2d(8, 5, 1)), example)
    plan = pws.plan(model, example, warm_start=True)
    assert plan.named("absorb") == ["0", "6.0"]
    assert plan.named("standardize") == ["3"]
    assert plan.fit() < 0.5
    actions = {step.name: step.action for step in pws.plan(model, example).steps}
    assert actions["6.0"] == "standardize"  # from scratch they are standardized


@torch.no_grad()
def test_both_forms_are_fitted_to_the_same() -> None:
    example = images(16, 3, 16, 16).double()
    model = trained(small().double(), example)
    plans = [pws.plan(model, example, warm_start=True, form=form) for form in ("optimizer", "layers")]
    plain, layers = (plan.apply().eval() for plan in plans)
    assert pws.marked(plain).keys() == {"3"}
    assert type(plain[3]) is nn.Conv2d
    assert type(layers[3]) is pws.Conv2d
    assert_close(layers(example), plain(example), "float64")
    assert plans[0].fit() == plans[1].fit()
    assert [plan.parameters_after for plan in plans] == [
        sum(p.numel() for p in converted.parameters()) for converted in (plain, layers)
    ]


def test_a_warm_start_under_autocast_is_as_near() -> None:
    """Autocast keeps copies of the weights, and would go on with those of before."""
    example = images(32, 3, 16, 16).abs()
    model = trained(small(), example)
    errors = []
    for enabled in (False, True):
        with torch.autocast("cpu", enabled=enabled):
            errors.append(pws.plan(model, example, warm_start=True).fit())
    assert errors[1] == pytest.approx(errors[0], abs=2**-7)  # outputs are rounded to 8 bits: with the old weights 1.3


def test_a_plan_is_fitted_once() -> None:
    """The error that it states is that of what `apply` returns, whatever happens to the model in between."""
    example = images(32, 3, 16, 16)
    model = trained(small(), example)
    seen: list[tuple[int, int]] = []
    plan = pws.plan(model, example, warm_start=True, progress=lambda *numbers: seen.append(numbers))
    plan.apply(calibrate=False)
    assert "not fitted yet" in str(plan)
    assert plan.output_error is None
    assert seen == []
    before = plan.apply().eval()(example)
    assert "outputs differ" in str(plan)
    assert plan.fit() == plan.output_error
    assert seen == [(1, 1)]
    nn.init.zeros_(model[3].weight)
    first, second = plan.apply(), plan.apply()
    assert torch.equal(first.eval()(example), before)
    assert first is not second


def test_a_plan_without_a_warm_start_is_not_fitted() -> None:
    plan = pws.plan(small(), images(2, 3, 16, 16))
    assert "warm start" not in str(plan)
    with pytest.raises(PwsError, match="only a warm start is fitted"):
        plan.fit()


def test_the_command_with_a_warm_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained(timm.create_model("resnet10t"), images(8, 3, 28, 28))
    torch.save(model.state_dict(), tmp_path / "trained.pt")
    out = tmp_path / "converted"
    arguments = ["convert", "--model", "timm:resnet10t", "--out", str(out), "--warm-start"]
    assert main(arguments) == 2
    assert "without --weights there is none" in capsys.readouterr().err
    arguments += ["--weights", str(tmp_path / "trained.pt")]
    assert main(arguments) == 2
    assert "--data is random" in capsys.readouterr().err
    assert main([*arguments, "--data", "digits"]) == 0
    printed = capsys.readouterr().out
    assert "warm start: outputs differ by" in printed
    assert "an optimizer of pws.optim trains it" in printed
    torch.save({"nothing": torch.ones(1)}, tmp_path / "other.pt")
    assert main([*arguments[:-1], str(tmp_path / "other.pt"), "--data", "digits", "--out", str(tmp_path / "b")]) == 2
    assert "must be a state dict of the model" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
