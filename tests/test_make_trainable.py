"""`pws.private.make_trainable`: Opacus takes what it gives, and it computes what the model did."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any, Final

import pytest
import torch
from opacus import PrivacyEngine
from opacus.grad_sample import GradSampleModule
from opacus.validators import ModuleValidator
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from tolerances import assert_close
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader, TensorDataset
from torchvision.ops import FrozenBatchNorm2d

import pws
from pws._layers import StandardizedLayer
from pws.private import make_trainable
from pws.private.affine_sampler import affine_grad_sample
from pws.surgery.stand_ins import Affine, Copy

MODES: Final = ("hooks", "functorch", "ghost")
LARGE: Final = 1e9
"""A norm that no gradient has: nothing is clipped."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Opacus warns of secure random numbers, and torch of full backward hooks on inputs without gradient."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module, x: Tensor) -> nn.Module:
    """With statistics and affine parameters as after training, and filters of mean zero, which a warm start keeps exactly."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear) and "weight" in module._parameters:
                module.weight.sub_(module.weight.mean(tuple(range(1, module.weight.dim())), keepdim=True))
            for name in ("weight", "bias", "running_mean"):
                tensor = getattr(module, name, None)
                if isinstance(tensor, Tensor) and "Norm" in type(module).__name__:
                    tensor.uniform_(0.5, 1.5)
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.momentum = None
        model.train()
        for _ in range(2):
            model(x)
    return model.eval()


def told(model: nn.Module, x: Any, **given: Any) -> tuple[nn.Module, str]:
    """The copy and the report."""
    texts: list[str] = []
    return make_trainable(model, x, report=texts.append, **given), "".join(texts)


def assert_accepted(model: nn.Module) -> None:
    assert ModuleValidator.validate(model, strict=False) == []
    assert GradSampleModule.validate(model, strict=False) == []
    assert model.training
    for module in model.modules():
        assert not isinstance(module, nn.modules.batchnorm._BatchNorm)
        assert not getattr(module, "inplace", False)
        assert not any(p.requires_grad for p in module.parameters(recurse=False)) or not list(module.buffers())


def network(norm: Callable[[int], nn.Module], dims: int = 2) -> nn.Sequential:
    conv: Any = getattr(nn, f"Conv{dims}d")
    pool: Any = getattr(nn, f"AdaptiveAvgPool{dims}d")
    first = (conv(3, 6, 3), norm(6), nn.ReLU(inplace=True))
    second = (conv(6, 8, 3, groups=2, bias=False), norm(8), nn.SiLU(inplace=True))
    depthwise = (conv(8, 8, 3, groups=8), norm(8), nn.Hardswish(inplace=True), nn.Dropout(inplace=True))
    return nn.Sequential(*first, *second, *depthwise, pool(1), nn.Flatten(), nn.Linear(8, 3))


NORMS: Final[dict[str, Callable[[int], nn.Module]]] = {
    "batch": nn.BatchNorm2d,
    "without affine": lambda channels: nn.BatchNorm2d(channels, affine=False),
    "synchronized": nn.SyncBatchNorm,
    "frozen": FrozenBatchNorm2d,
    "with activation": lambda channels: BatchNormAct2d(channels, inplace=True),
    "frozen, with activation": FrozenBatchNormAct2d,
    "instance, tracked": lambda channels: nn.InstanceNorm2d(channels, affine=True, track_running_stats=True),
    "group": lambda channels: nn.GroupNorm(2, channels),
}


@pytest.mark.parametrize("kind", NORMS)
def test_opacus_takes_the_copy_and_it_computes_the_same(kind: str) -> None:
    x = images(16, 3, 12, 12)
    model = trained(network(NORMS[kind]), x)
    before = deepcopy(model)
    copy, report = told(model, x)
    assert_accepted(copy)
    assert_close(copy.eval()(x), model(x), "identity float32")
    assert "no longer in place: " in report
    assert ("warm start: outputs differ by" in report) == (kind not in ("group", "frozen", "frozen, with activation"))
    # The model is left alone.
    assert str(model) == str(before)
    assert not model.training
    for one, other in zip(model.state_dict().values(), before.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(dims: int) -> None:
    x = images(16, 3, *[8] * dims)
    model = trained(network(getattr(nn, f"BatchNorm{dims}d"), dims), x)
    copy, _ = told(model, x)
    assert_accepted(copy)
    assert_close(copy.eval()(x), model(x), "identity float32")


def test_norms_without_running_statistics_get_those_of_the_images() -> None:
    """In eval mode they take those of the batch, here of the same images."""
    x = images(16, 3, 12, 12)
    model = trained(network(lambda channels: nn.BatchNorm2d(channels, track_running_stats=False)), x)
    copy, report = told(model, x)
    assert_accepted(copy)
    assert_close(copy.eval()(x), model(x), "identity float32")
    assert_close(copy(x[:5]), model(x)[:5], "identity float32")
    assert "running statistics taken from the images, for want of their own: 1, 4, 7\n" in f"{report}\n"
    assert model[1].running_mean is None


def test_norms_of_an_untrained_model_hold_nothing_to_keep() -> None:
    x = images(64, 3, 12, 12)
    copy, report = told(network(nn.BatchNorm2d), x)
    assert_accepted(copy)
    assert "no warm start: the norms hold no statistics of any training" in report
    assert "outputs differ" not in report
    # As after pws.convert: each standardized layer gives variance 1.
    hidden = copy.eval()[:4](x) - copy[3].bias.detach().view(-1, 1, 1)
    assert float(hidden.var()) == pytest.approx(1, rel=1e-2)


def test_lazy_layers_get_their_shapes() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3))
    assert_accepted(told(model, images(4, 3, 6, 6))[0])


@pytest.mark.parametrize("given", ["images", "noise"])
def test_filters_with_a_mean_lose_little(given: str) -> None:
    """On other images than those given: less than a third of what is lost by taking the means of the same filters out."""
    x = images(256, 3, 12, 12).abs()
    torch.manual_seed(0)
    layers = [(nn.Conv2d(i, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()) for i in (3, 16, 16)]
    model = nn.Sequential(*(module for block in layers for module in block), nn.Flatten(), nn.Linear(2304, 5))
    for _ in range(30):
        model.train()(x)
    noise = x.mean() + x.std() * torch.randn_like(x)
    copy = told(model.eval(), x[:128] if given == "images" else noise)[0].eval()
    centred = deepcopy(model)
    places = [place for place, module in copy.named_modules() if isinstance(module, StandardizedLayer)]
    assert places
    for place in places:
        weight = centred.get_parameter(f"{place}.weight")
        weight.data -= weight.mean((1, 2, 3), keepdim=True)
    wanted = model(x[128:])
    lost, without = (float((net(x[128:]) - wanted).square().mean()) ** 0.5 for net in (copy, centred))
    assert lost < without / 3


class Residual(nn.Module):
    """Pre-activation: a norm of a sum stays as a scale and shift; sums and an activation are written over norms' outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.conv, self.behind = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.depthwise, self.last = nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6)
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        y = self.behind(self.conv(x))
        y += x
        y = F.relu(self.last(y), inplace=True)
        return self.head(self.act(self.depthwise(y)).mean((2, 3)))


def batches() -> TensorDataset:
    return TensorDataset(images(24, 3, 8, 8), torch.arange(24) % 3)


def epochs(model: nn.Module, optimizer: Any, criterion: Any, loader: Any) -> None:
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()


@pytest.mark.parametrize("form", ["layers", "optimizer"])
@pytest.mark.parametrize("mode", MODES)
def test_without_noise_and_clipping_private_training_is_training(mode: str, form: str) -> None:
    copy, report = told(trained(Residual(), batches().tensors[0]), batches().tensors[0], form=form)
    assert_accepted(copy)
    assert "its scale and shift stay" in report
    assert isinstance(copy.last, nn.Sequential)
    assert [type(part) for part in copy.last] == [Affine, Copy]
    plain = deepcopy(copy)

    def sgd(model: nn.Module) -> torch.optim.Optimizer:
        if form == "layers":
            return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        return pws.optim.SGD(model, lr=0.3, momentum=0.9)

    optimizer = sgd(copy)
    parts: Any = PrivacyEngine().make_private(
        module=copy,
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(batches(), 8),
        noise_multiplier=0.0,
        max_grad_norm=LARGE,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    epochs(parts[0], parts[1], parts[2] if mode == "ghost" else nn.CrossEntropyLoss(), parts[-1])
    epochs(plain, sgd(plain), nn.CrossEntropyLoss(), DataLoader(batches(), 8))
    for one, other in zip(copy.parameters(), plain.parameters(), strict=True):
        assert_close(one, other, "trajectory float32")


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 7), (5, 4, 3, 2), (0, 4, 3, 2)])
def test_gradients_per_sample_of_a_scale_and_shift(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = Affine(torch.randn(4).double(), torch.randn(4).double(), fixed=False)
    x, backprops = torch.randn(shape).double(), torch.randn(shape).double()
    found = affine_grad_sample(layer, [x], backprops)

    def loss(parameters: dict[str, Tensor], sample: Tensor, backprop: Tensor) -> Tensor:
        return (functional_call(layer, parameters, (sample[None],)) * backprop).sum()

    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    if shape[0]:
        wanted = vmap(grad(loss), (None, 0, 0))(parameters, x, backprops)
        assert_close(found[layer.weight], wanted["weight"], "float64")
        assert_close(found[layer.bias], wanted["bias"], "float64")
    assert found[layer.weight].shape == found[layer.bias].shape == (shape[0], 4)


class Around(nn.Module):
    """A convolution and its norm, then a part on the sequence of pixels, then a head."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.part, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), part, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).relu().flatten(2).transpose(1, 2)
        found = self.part(y)
        return self.head((found[0] if isinstance(found, tuple) else found)[:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_become_those_of_opacus(kind: Any) -> None:
    x = images(8, 3, 6, 6)
    model = trained(Around(kind(8, 8, num_layers=2, batch_first=True)), x)
    copy, report = told(model, x)
    assert_accepted(copy)
    assert_close(copy.eval()(x), model(x), "identity float32")
    assert report.endswith("now Opacus' own layer, with the same weights: part")


def test_a_model_without_such_norms_is_copied() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.ReLU(inplace=True))
    copy, report = told(model, images(2, 3, 6, 6))
    assert_accepted(copy)
    assert report == "no norm was taken out: Opacus takes all that the model has\nno longer in place: 2"
    assert isinstance(copy[1], nn.InstanceNorm2d)
    assert model[2].inplace


def test_as_pws_layers() -> None:
    x = images(16, 3, 12, 12)
    model = trained(network(nn.BatchNorm2d), x)
    copy, _ = told(model, x, form="layers")
    assert_accepted(copy)
    assert isinstance(copy[3], StandardizedLayer)
    assert_close(copy.eval()(x), model(x), "identity float32")


def test_the_report_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    x = images(8, 3, 12, 12)
    make_trainable(trained(network(nn.BatchNorm2d), x), x)
    printed = capsys.readouterr().out
    assert "standardize 1, absorb 2, remove 3, keep 1" in printed
    assert printed.endswith("no longer in place: 2, 5, 8 and 1 more\n")


class Branches(nn.Module):
    """Norms that a plan keeps: behind filters of one entry, behind layers with one weight, and one that does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.behind_scale = nn.Conv2d(3, 3, 1, groups=3, bias=False), nn.BatchNorm2d(3)
        self.one, self.other, self.behind_both = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        self.other.weight = self.one.weight
        self.unused = nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.behind_scale(self.scale(x)).relu()
        y = self.behind_both(self.other(self.one(y)))
        return self.unused(y.repeat(1, 2, 1, 1)[:, :5]) if len(x) == 1 else y


def test_of_a_norm_that_no_layer_can_take_over_the_scale_and_shift_stay() -> None:
    x = images(16, 3, 12, 12)
    model = trained(Branches(), x)
    model.unused.requires_grad_(False)
    copy, report = told(model, x)
    assert_accepted(copy)
    for given in (x, x[:1]):
        assert_close(copy.eval()(given), model(given), "identity float32")
    assert "affine 3" in report
    assert report.count("its scale and shift stay") == 3
    assert [p.requires_grad for p in copy.unused.parameters()] == [False, False]
    assert [p.requires_grad for p in copy.behind_both.parameters()] == [True, True]
    assert f"{sum(p.numel() for p in copy.parameters())} after" in report


# --- What Opacus can't train ---


class Writes(nn.Module):
    """Its sum is written over a layer's output, without a norm between."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        y += x
        return y

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)


class Position(nn.Module):
    """A trained table and a constant index, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 8))
        self.register_buffer("index", torch.arange(16) % 4)

    def forward(self, x: Tensor) -> Tensor:
        index: Any = self.index
        return x + self.table[index]


class Attention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, x, x)


class Own(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input.transpose(1, 2)).transpose(1, 2)


FAULTS: Final[dict[str, tuple[Callable[[], nn.Module], str, str]]] = {
    "a sum in place": (Writes, "'part.linear', a Linear, ", r"x = x \+ y for x \+= y"),
    "a relu in place": (
        lambda: nn.Sequential(nn.Linear(8, 8), InPlace()),
        "'part.0', a Linear, ",
        r"relu\(x\) for relu_",
    ),
    "buffers": (Position, "'part', a Position, ", "buffers index.*_buffers.pop"),
    "a norm of another forward": (lambda: Own(8), "'part', a Own, ", "its forward is not torch's.*nn.GroupNorm"),
    "attention": (lambda: Attention(8, 2, batch_first=True), "'part', a Attention, ", "scaled_dot_product_attention"),
    "a recurrent layer": (lambda: nn.RNN(8, 8, batch_first=True), "'part', a RNN, ", "opacus.layers.DPRNN"),
    "a projection": (lambda: nn.LSTM(8, 9, batch_first=True, proj_size=8), "'part', a LSTM, ", "proj_size"),
    "weight norm": (
        lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
        "'part', a ParametrizedLinear, ",
        "permanent",
    ),
    "old weight norm": (lambda: nn.utils.weight_norm(nn.Linear(8, 8)), "'part', a Linear, ", "remove_weight_norm"),
    "pruning": (lambda: prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5), "'part', a Linear, ", "prune.remove"),
}
"""What is wrong, to a module with it, and what the error says: which module, what to do."""


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu_()


@pytest.mark.parametrize("fault", FAULTS)
def test_what_can_not_be_trained_is_named_with_what_to_do(fault: str) -> None:
    make, module, remedy = FAULTS[fault]
    x = images(8, 3, 6, 6)
    model = trained(Around(make()), x)
    with pytest.raises(pws.PwsError, match=f"needs the gradient of each sample by itself; {module}.*{remedy}"):
        told(model, x)


@pytest.mark.parametrize(
    "fault", ["buffers", "attention", "a recurrent layer", "weight norm", "pruning", "a sum in place"]
)
def test_it_may_stay_where_it_is_frozen(fault: str) -> None:
    x = images(8, 3, 6, 6)
    model = trained(Around(FAULTS[fault][0]().requires_grad_(False)), x)
    copy, _ = told(model, x)
    assert_close(copy.eval()(x), model(x), "identity float32")
    optimizer = torch.optim.SGD([p for p in copy.parameters() if p.requires_grad], lr=0.1)
    private, noisy, loader = PrivacyEngine().make_private(
        module=copy.train(),
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(x, torch.arange(8) % 3), 4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    before = copy.head.weight.detach().clone()
    epochs(private, noisy, nn.CrossEntropyLoss(), loader)
    assert not torch.equal(copy.head.weight, before)


@pytest.mark.parametrize("kind", ["batch", "group", "free"])
def test_images_that_do_not_fit(kind: str) -> None:
    norms = {**NORMS, "free": lambda channels: nn.BatchNorm2d(channels, track_running_stats=False)}
    with pytest.raises(
        pws.PwsError, match=r"Sequential can't be run on the example: RuntimeError: .* Give what its forward"
    ):
        told(network(norms[kind]), images(4, 5, 12, 12))


def test_without_opacus_the_extra_is_named() -> None:
    code = """
import sys
sys.modules["opacus"] = None
import pws
try:
    import pws.private
except pws.PwsError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "pws.private needs opacus: pip install 'pws-torch[private]'.\n"
