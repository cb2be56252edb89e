"""Conversion of models that are not what they seem: each test is a kind of fault, with the right value computed apart."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from torchvision.ops import DeformConv2d, FrozenBatchNorm2d

import pws
from pws.surgery.stand_ins import Affine, Copy


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


X = images(16, 4, 8, 8)


class Parts(nn.Module):
    """A model from named parts and a function of them and the input."""

    def __init__(self, run: Callable[[Any, Any], Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Any) -> Any:
        return self.run(self, x)


def conv(a: int = 4, b: int = 4, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(a, b, 3, padding=1, **{"bias": False, **settings})


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.02 * images(*shape))


def norm() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(4)


def what(model: nn.Module, example: Any = X, **settings: Any) -> dict[str, str]:
    return {step.name: step.action for step in pws.plan(model, example, **settings).steps}


# A. What a norm normalizes is followed to the parameters that made it.


class Detectron(nn.Conv2d):
    """A convolution that calls its own norm."""

    def __init__(self) -> None:
        super().__init__(4, 4, 3, padding=1, bias=False)
        self.norm = norm()

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(self.norm(F.conv2d(input, self.weight, None, 1, 1)))


def rows(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


WITHOUT_A_LAYER: dict[str, Callable[[], nn.Module]] = {
    "functional convolution": lambda: Parts(
        lambda m, x: m.norm(F.relu(F.conv2d(m.conv(x), m.w))), conv=conv(), w=parameter(4, 4, 3, 3), norm=norm()
    ),
    "computed weight": lambda: Parts(
        lambda m, x: m.norm(F.conv2d(x, m.w * 2 + 1)), w=parameter(4, 4, 3, 3), norm=norm()
    ),
    "matrix product": lambda: Parts(lambda m, x: m.norm(x @ m.w), w=parameter(8, 8), norm=norm()),
    "einsum": lambda: Parts(lambda m, x: m.norm(torch.einsum("ncij,cd->ndij", x, m.w)), w=parameter(4, 4), norm=norm()),
    "position added to the input": lambda: Parts(lambda m, x: m.norm(x + m.p), p=parameter(4, 8, 8), norm=norm()),
    "scaled input": lambda: Parts(lambda m, x: m.norm(x * m.s), s=parameter(4, 1, 1), norm=norm()),
    "scaled layer": lambda: Parts(lambda m, x: m.norm(m.conv(x) * m.s), conv=conv(), s=parameter(4, 1, 1), norm=norm()),
    "computed kernel": lambda: Parts(
        lambda m, x: m.norm(F.conv2d(x, m.kernel(x.mean((0, 2, 3))).view(4, 4, 3, 3))),
        kernel=nn.Linear(4, 144),
        norm=norm(),
    ),
    "GRU": lambda: Parts(
        lambda m, x: m.norm(m.gru(rows(x))[0].transpose(1, 2)),
        gru=nn.GRU(4, 4, batch_first=True),
        norm=nn.BatchNorm1d(4),
    ),
    "LSTM": lambda: Parts(
        lambda m, x: m.norm(m.lstm(rows(x))[0].transpose(1, 2)),
        lstm=nn.LSTM(4, 4, batch_first=True),
        norm=nn.BatchNorm1d(4),
    ),
    "attention": lambda: Parts(
        lambda m, x: m.norm(m.attention(rows(x), rows(x), rows(x))[0].transpose(1, 2)),
        attention=nn.MultiheadAttention(4, 2, batch_first=True),
        norm=nn.BatchNorm1d(4),
    ),
    "deformable convolution": lambda: Parts(
        lambda m, x: m.norm(m.deform(x, m.offset(x))),
        offset=conv(4, 18),
        deform=DeformConv2d(4, 4, 3, padding=1),
        norm=norm(),
    ),
    "layer called by its forward": lambda: Parts(lambda m, x: m.norm(m.conv.forward(x)), conv=conv(), norm=norm()),
    "convolution with its own norm": lambda: Detectron(),
    "a function of its own with a parameter": lambda: Parts(
        lambda m, x: m.norm(Scaled.apply(m.conv(x), m.s)), conv=conv(), s=parameter(4, 1, 1), norm=norm()
    ),
}


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        return scale * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], gradients[0].sum()


@pytest.mark.parametrize("kind", WITHOUT_A_LAYER)
def test_a_norm_stays_where_no_layer_does_its_work(kind: str) -> None:
    torch.manual_seed(0)
    model = WITHOUT_A_LAYER[kind]()
    plan = pws.plan(model, X)
    (step,) = (step for step in plan.steps if step.kind.startswith("BatchNorm"))
    assert step.action == "keep"
    assert step.reason
    converted = plan.apply()
    assert converted(X).var().item() == pytest.approx(model(X).var().item(), rel=0.05)


def test_a_learned_activation_and_an_added_position_are_behind_their_layer() -> None:
    model = Parts(
        lambda m, x: m.norm2(m.prelu(m.conv2(m.norm(m.conv(x) + m.p)))),
        conv=conv(), conv2=conv(), norm=norm(), norm2=norm(), prelu=nn.PReLU(), p=parameter(4, 8, 8),
    )  # fmt: skip
    assert what(model) == {"conv": "standardize", "norm": "remove", "conv2": "standardize", "norm2": "remove"}


# B. A norm's own forward.


class Activated(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(input), 0.01)


class Conditional(nn.BatchNorm2d):
    def forward(self, input: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        return super().forward(input) * scale


def test_a_norm_with_a_forward_of_its_own_stays() -> None:
    patched = norm()
    patched.forward = lambda x: nn.BatchNorm2d.forward(patched, x).tanh()  # type: ignore[method-assign]
    for model in (
        nn.Sequential(conv(), Activated(4), conv(), norm()),
        Parts(lambda m, x: m.norm(m.conv(x), 2.0), conv=conv(), norm=Conditional(4)),
        nn.Sequential(conv(), patched),
    ):
        plan = pws.plan(model, X)
        own = [step for step in plan.steps if step.reason.startswith("its forward is not torch's")]
        assert [step.action for step in own] == ["keep"]
        assert plan.apply()(X).shape == X.shape


# C. What stands in for a norm gives a tensor of its own.


def half_written(m: Any, x: Tensor) -> Tensor:
    y = m.conv(m.stem(x))
    return torch.cat([F.relu(m.norm(y[:, :4]), inplace=True), y], 1)


def half_apart(m: Any, x: Tensor) -> Tensor:
    y = m.conv(m.stem(x))
    return torch.cat([F.relu(m.norm(y[:, :4])), y], 1)


def view_written(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.stem(x))
    z = m.norm(y)
    z.view(-1).mul_(2)
    return torch.cat([z, y], 1)


def view_apart(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.stem(x))
    return torch.cat([m.norm(y) * 2, y], 1)


def slice_set(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.stem(x))
    z = m.norm(y)
    z[:, :2] = 0
    return torch.cat([z, y], 1)


def slice_apart(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.stem(x))
    z = m.norm(y)
    return torch.cat([torch.zeros_like(z[:, :2]), z[:, 2:], y], 1)


def input_written(m: Any, x: Tensor) -> Tensor:
    y = m.conv(F.relu(m.stem(x)))
    z = m.norm(y)
    y += 1
    return torch.cat([z, y], 1)


def input_apart(m: Any, x: Tensor) -> Tensor:
    y = m.conv(F.relu(m.stem(x)))
    return torch.cat([m.norm(y), y + 1], 1)


def narrow_written(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.stem(x))
    z = m.norm(y)
    z.narrow(1, 0, 2).add_(1)
    return torch.cat([z, y], 1)


def narrow_apart(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.stem(x))
    z = m.norm(y)
    return torch.cat([z[:, :2] + 1, z[:, 2:], y], 1)


def out_written(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.stem(x)).detach()
    z = m.norm(y).detach()
    torch.add(z, 1, out=z)
    return torch.cat([z, y, m.stem(x)], 1)


def out_apart(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.stem(x)).detach()
    return torch.cat([m.norm(y).detach() + 1, y, m.stem(x)], 1)


def added(m: Any, x: Tensor) -> Tensor:
    y = m.stem(x)
    z = m.norm(F.relu(m.conv(y)))
    z += y
    return z


def added_apart(m: Any, x: Tensor) -> Tensor:
    y = m.stem(x)
    return m.norm(F.relu(m.conv(y))) + y


def hooked_with(double: bool) -> Callable[[Any, Tensor], Tensor]:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x)
        z = m.norm(y)
        if double and z.requires_grad:
            z.register_hook(lambda gradient: 2 * gradient)
        return torch.cat([z if double else z + (z - z.detach()), y], 1)

    return run


WRITING = {
    "in place on half": (half_written, half_apart),
    "through a view": (view_written, view_apart),
    "a slice set": (slice_set, slice_apart),
    "the norm's input": (input_written, input_apart),
    "a part": (narrow_written, narrow_apart),
    "an argument out=": (out_written, out_apart),
    "an addition in place": (added, added_apart),
    "a hook on the gradient": (hooked_with(True), hooked_with(False)),
}


@pytest.mark.parametrize("kind", WRITING)
def test_what_is_written_where_a_norm_was_reaches_no_other_tensor(kind: str) -> None:
    """Values and gradients are those of the same model without anything in place."""
    torch.manual_seed(0)
    parts = {"stem": conv(), "conv": conv(), "norm": norm()}
    both = [pws.convert(Parts(run, **deepcopy(parts)), X, calibrate=False) for run in WRITING[kind]]
    assert not isinstance(both[0].norm, nn.BatchNorm2d)
    outputs = [model(X) for model in both]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(*(model.stem.weight.grad for model in both))


def test_hooks_of_a_norm_stay() -> None:
    model = nn.Sequential(conv(), norm(), conv(), norm())
    model[1].register_forward_hook(lambda module, given, output: output * 3)
    converted = pws.convert(model, X, calibrate=False)
    torch.testing.assert_close(converted[1](X), 3 * X)
    assert type(converted[3]) is nn.Identity


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_parts_are_converted_as_others(reentrant: bool) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.norm(m.conv(x))
        return checkpoint(lambda y: m.norm2(m.conv2(F.relu(y))), x, use_reentrant=reentrant)  # type: ignore[no-any-return]

    model = Parts(run, conv=conv(), conv2=conv(), norm=norm(), norm2=norm())
    assert what(model) == {"conv": "standardize", "norm": "remove", "conv2": "standardize", "norm2": "remove"}


def test_where_plain_layers_read_it_a_norm_leaves_nothing() -> None:
    model = nn.Sequential(conv(), norm(), nn.ReLU(inplace=True), conv(), norm())
    converted = pws.convert(model, X)
    assert type(converted[1]) is nn.Identity
    assert type(converted[4]) is nn.Identity
    flat = pws.convert(nn.Sequential(nn.ReLU(), conv(), nn.ReLU(), norm(), nn.Flatten(), nn.Linear(256, 2)), X)
    assert type(flat[3]) is Copy


# C2. The same plan on every run.


def test_the_plan_of_a_detector_is_the_same_on_every_run() -> None:
    detector = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64, norm_layer=nn.BatchNorm2d
    )
    example = [images(3, 64, 64), images(3, 48, 64)]
    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1])} for _ in example]
    torch.manual_seed(0)
    plans = {str(pws.plan(detector, (example, targets))) for _ in range(20)}
    assert len(plans) == 1


# K, L. Weights, numbers and modes that can't be standardized.


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_a_layer_of_constant_filters_stays_and_says_why(value: float) -> None:
    model = nn.Sequential(conv(), norm(), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4))
    nn.init.constant_(model[4].weight, value)
    plan = pws.plan(model, X)
    assert [(s.action, s.reason) for s in plan.steps if s.name == "4"] == [
        ("keep", "its filters are constant, 0 for example: without a mean nothing of them is left")
    ]
    assert torch.equal(plan.apply()[4].weight, model[4].weight)


class Force(nn.Module):
    """The gradient of an energy."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh()
        )

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("warm_start", [False, True])
def test_a_model_that_differentiates_inside_its_forward(warm_start: bool) -> None:
    x = images(64, 3)
    converted = pws.convert(Force(), x, warm_start=warm_start)
    assert converted(x).abs().max() > 0
    pws.calibrate(converted, x, target=4.0)
    for name in pws.marked(converted):
        layer = converted.get_submodule(name)
        seen = layer(x if name == "energy.0" else converted.energy[:3](x)) - layer.bias
        assert seen.var(correction=0).item() == pytest.approx(4, rel=1e-4)


def test_complex_layers_are_skipped() -> None:
    model = Parts(lambda m, x: m.norm(m.conv(x.to(torch.cfloat)).real), conv=conv().to(torch.cfloat), norm=norm())
    assert what(model) == {"conv": "skip", "norm": "keep"}


def test_a_model_without_memory_is_planned_and_calibrated_later() -> None:
    with torch.device("meta"):
        model = nn.Sequential(conv(), norm(), nn.ReLU(), conv(), norm())
    plan = pws.plan(model, X.to("meta"))
    assert plan.named("remove") == ["1", "4"]
    with pytest.raises(pws.PwsError, match=r"device meta.*calibrate=False"):
        plan.apply()
    assert pws.marked(plan.apply(calibrate=False)).keys() == {"0", "3"}


class Skipped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(), norm()

    def forward(self, x: Tensor) -> Tensor:
        if self.training and (random.random() < 0.99 or np.random.rand() < 0.99):
            return x
        return x + self.norm(self.conv(x))


def test_blocks_that_training_skips_at_random_are_converted_and_random_numbers_stay() -> None:
    model = nn.Sequential(conv(), norm(), Skipped(), conv(), norm())
    random.seed(0)
    np.random.seed(0)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    found = what(model)
    assert {name for name, action in found.items() if action == "remove"} == {"1", "2.norm", "4"}
    assert state == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_a_scripted_activation_is_behind_its_layer() -> None:
    class Swish(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(x)

    scripted = torch.jit.script(Swish())
    assert what(nn.Sequential(conv(), scripted, norm())) == {"0": "standardize", "2": "remove"}


def test_a_norm_behind_what_cannot_be_followed_stays_and_says_so() -> None:
    scripted = torch.jit.script(conv())
    plan = pws.plan(nn.Sequential(conv(), norm(), nn.ReLU(), scripted, norm()), X)
    assert [(s.action, s.reason) for s in plan.steps if s.name == "4"] == [
        ("keep", "where its input comes from can't be followed")
    ]


def test_several_inputs_are_calibrated() -> None:
    model = Parts(lambda m, x: m.norm(m.conv(x)), conv=conv(), norm=norm())
    model.forward = lambda a, b: model.run(model, a + b)  # type: ignore[method-assign]
    converted = pws.mark(conv())
    two = Parts(lambda m, x: m.conv(x), conv=converted)
    two.forward = lambda a, b: two.run(two, a + b)  # type: ignore[method-assign]
    pws.calibrate(two, [((X, X), torch.zeros(16)), ((2 * X, X), torch.zeros(16))])
    together = torch.cat([two(X, X), two(2 * X, X)])
    assert together.var(correction=0).item() == pytest.approx(1, rel=1e-4)


# S. Layers that predict, norms of the input.


@pytest.mark.parametrize("warm_start", [False, True])
def test_a_layer_that_predicts_stays_plain(warm_start: bool) -> None:
    model = nn.Sequential(conv(), norm(), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4))
    converted = pws.convert(model, X, warm_start=warm_start)
    assert "4" not in pws.marked(converted)
    assert torch.equal(converted[4].weight, model[4].weight)
    assert torch.equal(converted[4].bias, model[4].bias)


def test_a_norm_of_the_input_becomes_a_fixed_scale_and_shift() -> None:
    model = nn.Sequential(norm(), conv(), norm())
    x = 3 * X + torch.arange(4.0).view(1, 4, 1, 1)
    converted = pws.convert(model, x)
    assert type(converted[0]) is Affine
    assert not any(p.requires_grad for p in converted[0].parameters())
    torch.testing.assert_close(converted[0](x), nn.BatchNorm2d(4)(x), atol=1e-5, rtol=1e-5)
    model.train()
    for _ in range(50):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = pws.convert(model, 7 * x)
    torch.testing.assert_close(trained[0](x), model.eval()[0](x), atol=1e-5, rtol=1e-5)


# T. Modules as YOLO's.


class Head(nn.Module):
    """Takes a list, and has an attribute `inplace`."""

    inplace = True

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 2, 1)

    def forward(self, xs: list[Tensor]) -> Tensor:
        return self.conv(xs[0])


def fused(block: Any) -> Tensor:
    """As `fuse()` of YOLO: the norm's scale and shift, into the layer before it."""
    scale = block[1].weight / (block[1].running_var + block[1].eps).sqrt()
    shift = block[1].bias - block[1].running_mean * scale
    return F.conv2d(X, block[0].weight * scale.view(-1, 1, 1, 1), shift, padding=1)


def test_a_head_that_takes_a_list_and_a_block_that_fuses() -> None:
    model = Parts(lambda m, x: m.head([m.block(x)]), block=nn.Sequential(conv(), norm()), head=Head())
    converted = pws.convert(model, X)
    with torch.no_grad():
        converted.block[0].bias.add_(1)
    before = pws.fold(converted, like=model)
    torch.testing.assert_close(fused(before.block), converted.block(X))
    torch.testing.assert_close(before(X), converted(X))


# J. Subclasses, pruning, copies.


@pytest.mark.parametrize("form", ["optimizer", "layers"])
def test_a_converted_subclass_is_replicated_pruned_and_parametrized(form: str) -> None:
    layer = pws.convert(nn.Sequential(Conv2dSame(4, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6)), X, form=form)[0]
    replica = layer._replicate_for_data_parallel()
    replica._parameters = {}
    for name, value in layer._parameters.items():
        setattr(replica, name, value.clone())
    torch.testing.assert_close(replica(X), layer(X))
    pruned = prune.l1_unstructured(deepcopy(layer), "weight", 0.5)
    assert (pruned.weight == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert pruned(X).shape == layer(X).shape
    torch.testing.assert_close(parametrizations.weight_norm(deepcopy(layer))(X), layer(X), atol=1e-5, rtol=1e-5)


def test_fold_refuses_a_forward_that_it_would_lose() -> None:
    class Doubled(pws.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Named(pws.Conv2d):
        name = "a subclass with the parent's forward"

    with pytest.raises(pws.PwsError, match="a Doubled has a forward of its own"):
        pws.fold(nn.Sequential(Doubled(4, 4, 3)))
    named = Named(4, 4, 3)
    torch.testing.assert_close(pws.fold(named)(X), named(X))


# U. A converted model built again without data.


@pytest.mark.parametrize("warm_start", [False, True])
def test_a_plan_is_saved_and_applied_to_the_architecture(tmp_path: Path, warm_start: bool) -> None:
    def build() -> nn.Module:
        return nn.Sequential(norm(), conv(), nn.ReLU(inplace=True), norm(), nn.Flatten(), nn.Linear(256, 3))

    plan = pws.plan(build(), X, warm_start=warm_start)
    converted = plan.apply()
    plan.save(tmp_path / "plan.json")
    loaded = pws.Plan.load(tmp_path / "plan.json")
    assert loaded.steps == plan.steps
    again = loaded.apply(build())
    again.load_state_dict(converted.state_dict())
    assert torch.equal(again(X), converted(X))
    assert pws.marked(again) == pws.marked(converted)
    for wrong, words in ((nn.Sequential(conv()), "this model"), (None, "holds no model")):
        with pytest.raises(pws.PwsError, match=words):
            loaded.apply(wrong)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"steps": 3}', '{"steps": [{"nonsense": 1}]}', "null"])
def test_a_file_without_a_plan_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(pws.PwsError, match="must hold a plan"):
        pws.Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("form", ["optimizer", "layers"])
@pytest.mark.parametrize("warm_start", [False, True])
def test_fold_back_to_the_original_architecture(warm_start: bool, form: str) -> None:
    # A fit takes seconds with the fan-ins of resnet18.
    name = "test_resnet" if warm_start else "resnet18"
    model = timm.create_model(name, num_classes=5)
    x = images(8, 3, 32, 32)
    with torch.no_grad():
        model(x)
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = pws.convert(model, x, warm_start=warm_start, form=form).eval()
    with torch.no_grad():
        for p in converted.parameters():
            p.add_(0.01 * torch.randn_like(p))
    before = pws.fold(converted, like=model)
    assert type(before.layer1[0].bn1) is nn.BatchNorm2d
    again = timm.create_model(name, num_classes=5)
    again.load_state_dict(before.state_dict())
    torch.testing.assert_close(again.eval()(x), converted(x), atol=1e-4, rtol=1e-4)


# V. Trained and frozen norms.


def test_trained_norms_without_a_warm_start_are_warned_of() -> None:
    model = nn.Sequential(conv(), norm(), conv(), norm())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pws.convert(model, X)
        model(X)
        model.eval()
        pws.convert(model, X, warm_start=True)
    with pytest.warns(UserWarning, match="2 norms that are taken out, such as '1'.*warm_start=True"):
        pws.convert(model, X)


def test_frozen_stages_stay_frozen() -> None:
    frozen = [
        part.requires_grad_(False) for part in (conv(), FrozenBatchNorm2d(4), nn.ReLU(), conv(), FrozenBatchNorm2d(4))
    ]
    model = nn.Sequential(*frozen, conv(), FrozenBatchNorm2d(4))
    plan = pws.plan(model, X)
    assert plan.named("keep") == ["0", "1", "3", "4"]
    assert plan.named("standardize") == ["5"]
    converted = plan.apply()
    assert [n for n, p in converted.named_parameters() if not p.requires_grad] == ["0.weight", "3.weight"]
    torch.testing.assert_close(converted[:5](X), model[:5](X))


# Misspelt names.


@pytest.mark.parametrize("keep", ["layer9*", ["0", "nothing"]])
def test_a_pattern_that_nothing_has_is_refused(keep: Any) -> None:
    with pytest.raises(pws.PwsError, match="unknown layer or norm to keep"):
        pws.plan(nn.Sequential(conv(), norm()), X, keep=keep)


@pytest.mark.parametrize("example", [None, "images", 3])
def test_an_example_that_is_none_is_refused(example: Any) -> None:
    with pytest.raises(pws.PwsError):
        pws.plan(nn.Sequential(conv(), norm()), example)


# One form of batch.


class Named(nn.Module):
    """Takes arguments by name, as Hugging Face's models, and returns the loss beside its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = conv(), norm(), nn.Linear(4, 3)

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.norm(self.conv(pixels)).relu().mean((2, 3)))
        return {"logits": logits} if labels is None else {"logits": logits, "loss": F.cross_entropy(logits, labels)}


LABELS = torch.arange(16) % 3
FORMS: dict[str, tuple[Callable[[], nn.Module], Any, Any]] = {
    "the inputs": (lambda: nn.Sequential(conv(), norm()), X, X),
    "inputs and labels, as a loader gives them": (lambda: nn.Sequential(conv(), norm()), (X, LABELS), [(X, LABELS)]),
    "a list of both": (lambda: nn.Sequential(conv(), norm()), [X, LABELS], [[X, LABELS]]),
    "names": (Named, {"pixels": X}, [{"pixels": X}]),
    "names with the labels": (Named, {"pixels": X, "labels": LABELS}, [{"pixels": X, "labels": LABELS}]),
    "several inputs": (
        lambda: Two(),
        ((X, X), LABELS),
        [((X, X), LABELS)],
    ),
}


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(), norm()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.norm(self.conv(a + b))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", FORMS)
def test_plan_and_calibrate_take_a_batch_as_a_loader_gives_it(kind: str) -> None:
    build, example, batches = FORMS[kind]
    plan = pws.plan(build(), example)
    assert len(plan.named("remove")) == 1
    converted = plan.apply()
    layer = next(iter(pws.marked(converted)))
    (first, *_) = pws.calibrate(converted, batches, target=2.0)
    assert first.layer == layer
    assert first.variance == pytest.approx(1, rel=1e-4)


def test_what_is_odd_is_run_by_a_function() -> None:
    def forward(model: Any, batch: Any) -> Any:
        return model(batch["images"] * 2)

    model = nn.Sequential(conv(), norm())
    batch = {"images": X, "names": ["a", "b"]}
    converted = pws.convert(model, batch, forward=forward)
    assert converted[0](2 * X).var(correction=0).item() == pytest.approx(1, rel=1e-3)
    (found,) = pws.calibrate(converted, batch, forward=forward, target=2.0)
    assert found.variance == pytest.approx(1, rel=1e-3)
