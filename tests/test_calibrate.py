"""`pws.calibrate`: the variance it promises, what it leaves alone, and that ranks agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import pws
from pws._layers import StandardizedLayer

FORMS = {"optimizer": nn, "layers": pws}


class Net(nn.Module):
    """Every kind of thing `calibrate` must cope with; registered in another order than it runs."""

    def __init__(self, form: str) -> None:
        super().__init__()
        kinds: Any = FORMS[form]
        self.head = kinds.Linear(6, 5)
        self.up = kinds.ConvTranspose2d(8, 6, 3, stride=2, groups=2)
        self.plain = nn.Conv2d(8, 8, 1)
        self.twice = kinds.Conv2d(8, 8, 3, padding=1, bias=False)
        self.stem = kinds.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        if form == "optimizer":
            for layer in (self.head, self.up, self.twice, self.stem):
                pws.mark(layer, reset_parameters=True)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.stem(images)).relu()
        x = self.drop(self.twice(self.twice(x).relu())).relu()
        return self.head(self.up(self.plain(x).relu()).relu().movedim(1, -1))


ORDER = ["stem", "twice", "up", "head"]
Made = tuple[Net, Tensor]


def make(form: str) -> Made:
    """A net whose scales and biases are not at their initial values, and a batch with a mean."""
    net = Net(form)
    for layer in standardized(net).values():
        scale = scale_of(layer)
        scale.data.mul_(torch.empty(len(scale), *[1] * (scale.dim() - 1)).uniform_(0.5, 3))
        if layer.bias is not None:
            nn.init.normal_(layer.bias)
    return net, torch.randn(12, 3, 9, 9) + 0.5


@pytest.fixture(params=FORMS)
def made(request: pytest.FixtureRequest) -> Made:
    return make(request.param)


def standardized(model: nn.Module) -> dict[str, Any]:
    marked = pws.marked(model)
    return {name: m for name, m in model.named_modules() if name in marked or isinstance(m, StandardizedLayer)}


def scale_of(layer: Any) -> nn.Parameter:
    """What `calibrate` multiplies."""
    return layer.alpha if isinstance(layer, StandardizedLayer) else layer.weight


@torch.no_grad()
def variances(model: nn.Module, images: Tensor, per_channel: bool = False) -> dict[str, Tensor]:
    """`(channels,)` or `(1,)` for every standardized layer: of its first output less its bias, by hooks of our own."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def look(layer: Any, _: Any, output: Tensor) -> None:
            channels = output.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1).double()
            if layer.bias is not None:
                channels = channels - layer.bias[:, None].double()
            rows = channels if per_channel else channels.reshape(1, -1)
            found.setdefault(name, rows.var(1, correction=0))

        return look

    handles = [layer.register_forward_hook(hook(name)) for name, layer in standardized(model).items()]
    mode = model.training
    model.eval()(images)
    model.train(mode)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("target", [1.0, 2.0])
def test_every_layer_gets_the_target_variance(made: Made, target: float, per_channel: bool) -> None:
    net, images = made
    before = variances(net, images, per_channel)
    pws.calibrate(net, images, target=target, per_channel=per_channel)
    for name, variance in variances(net, images, per_channel).items():
        assert_close(variance, torch.full_like(variance, target), "calibrated")
        assert (before[name] / target - 1).abs().min() > 0.01, (
            f"{name} had the target variance before: nothing is shown"
        )


def test_one_factor_a_layer_unless_per_channel(made: Made) -> None:
    (net, images), ratios = made, {}
    for per_channel in (False, True):
        calibrated = deepcopy(net)
        pws.calibrate(calibrated, images, per_channel=per_channel)
        ratios[per_channel] = (scale_of(calibrated.up) / scale_of(net.up)).detach()
    assert_close(ratios[False].std() / ratios[False].mean(), 0.0, "float32")
    assert ratios[True].std() > 0.01


def test_the_report_is_in_execution_order_and_says_what_was_done(made: Made) -> None:
    net, images = made
    old = {name: scale_of(layer).detach().clone() for name, layer in standardized(net).items()}
    report = pws.calibrate(net, images)
    assert [entry.layer for entry in report] == ORDER != list(standardized(net))
    for entry in report:
        ratio = scale_of(standardized(net)[entry.layer]).detach() / old[entry.layer]
        assert_close(ratio, torch.full_like(ratio, entry.factor), "calibrated")
        assert_close(entry.variance * entry.factor**2, 1.0, "calibrated")


def test_later_layers_see_calibrated_earlier_ones(made: Made) -> None:
    """What the report found for a layer is what it puts out once those that run before it are calibrated."""
    net, images = made
    stepwise = deepcopy(net)
    for entry in pws.calibrate(net, images):
        found = variances(stepwise, images)[entry.layer]
        assert_close(found, torch.full_like(found, entry.variance), "calibrated")
        pws.calibrate(stepwise, images, only=lambda name, _, now=entry.layer: name == now)


def test_only_the_chosen_layers_change(made: Made) -> None:
    net, images = made
    old = {name: scale_of(layer).detach().clone() for name, layer in standardized(net).items()}
    asked: list[str] = []

    def only(name: str, layer: nn.Module) -> bool:
        asked.append(name)
        assert layer is net.get_submodule(name)
        return isinstance(layer, nn.Conv2d)

    assert [entry.layer for entry in pws.calibrate(net, images, only=only)] == ["stem", "twice"]
    assert sorted(asked) == sorted(ORDER)
    changed = {name for name, layer in standardized(net).items() if not torch.equal(scale_of(layer), old[name])}
    assert changed == {"stem", "twice"}


@pytest.mark.parametrize("per_channel", [False, True])
def test_deterministic_and_idempotent(made: Made, per_channel: bool) -> None:
    net, images = made
    copies = [deepcopy(net) for _ in range(2)]
    for copy in copies:
        pws.calibrate(copy, images, per_channel=per_channel)
    again = deepcopy(copies[0])
    report = pws.calibrate(again, images, per_channel=per_channel)
    for name in ORDER:
        scale = scale_of(standardized(copies[0])[name])
        assert torch.equal(scale, scale_of(standardized(copies[1])[name]))
        assert_close(scale_of(standardized(again)[name]), scale, "calibrated")
    assert all(entry.factor == pytest.approx(1, rel=1e-5) for entry in report)


BATCHES: dict[str, Callable[[Tensor], Any]] = {
    "list of tensors": lambda images: [images[:5], images[5:]],
    "tuples that start with the input": lambda images: [(images[:5], torch.zeros(5)), (images[5:], torch.zeros(7))],
    "lists": lambda images: [[images, "label"]],
    "generator": lambda images: (part for part in images.split(4)),
    "data loader": lambda images: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), batch_size=5),
}


@pytest.mark.parametrize("form", BATCHES)
def test_batches_are_joined(made: Made, form: str) -> None:
    net, images = made
    other = deepcopy(net)
    pws.calibrate(net, images)
    pws.calibrate(other, BATCHES[form](images))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


@contextmanager
def unchanged_but_scales(model: nn.Module, *, scales_too: bool = False) -> Iterator[None]:
    """Asserts that modes, buffers, parameters, flags, hooks and the random state are the same after as before."""

    scales = {scale_of(layer) for layer in standardized(model).values()}

    def state() -> dict[str, Any]:
        tensors = {
            name: (id(t), t.clone(), t.requires_grad, t.grad)
            for name, t in [*model.named_parameters(), *model.named_buffers()]
            if scales_too or t not in scales
        }
        hooks = [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()]
        modes = [m.training for m in model.modules()]
        return {"tensors": tensors, "rest": (hooks, modes, torch.is_grad_enabled(), torch.get_rng_state().tolist())}

    before = state()
    yield
    after = state()
    assert before["rest"] == after["rest"]
    assert before["tensors"].keys() == after["tensors"].keys()
    for name, (identity, value, *flags) in before["tensors"].items():
        assert (identity, *flags) == (after["tensors"][name][0], *after["tensors"][name][2:])
        assert torch.equal(value, after["tensors"][name][1])


@pytest.mark.parametrize("training", [True, False])
def test_all_but_the_scales_stays(made: Made, training: bool) -> None:
    net, images = made
    net.train(training)
    net.norm.train(not training)
    net.stem.register_forward_hook(lambda *_: None)
    with unchanged_but_scales(net):
        pws.calibrate(net, images)
    assert all(scale_of(layer).requires_grad and scale_of(layer).is_leaf for layer in standardized(net).values())


def nan_in(images: Tensor) -> Tensor:
    images = images.clone()
    images[3, 1, 4, 4] = float("nan")
    return images


UNUSABLE: dict[str, Callable[[Tensor], Any]] = {
    "zeros": torch.zeros_like,
    "nan": nan_in,
    "infinite": lambda images: images / 0,
    "no batch": lambda images: [],
    "exhausted iterator": lambda images: iter(()),
    "batch without samples": lambda images: images[:0],
    "batch of no tensor": lambda images: ["images"],
    "empty tuple": lambda images: [()],
    "dictionary": lambda images: [{"image": images}],
    "one tuple, not in a list": lambda images: (images, torch.zeros(len(images))),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_batches_are_refused_and_change_nothing(made: Made, case: str) -> None:
    net, images = made
    with unchanged_but_scales(net, scales_too=True), pytest.raises(pws.PwsError, match=r"calibrate needs|batch"):
        pws.calibrate(net, UNUSABLE[case](images))


@pytest.mark.parametrize("layer", [pws.Conv2d(3, 8, 3), pws.mark(nn.Conv2d(3, 8, 3), reset_parameters=True)])
def test_a_constant_image_is_refused_not_amplified(layer: nn.Module) -> None:
    """A kernel that sums to 0 answers a constant with rounding noise, whose variance is 1e-15 and not exactly 0."""
    net = nn.Sequential(layer)
    with unchanged_but_scales(net, scales_too=True), pytest.raises(pws.PwsError, match="output that varies"):
        pws.calibrate(net, torch.full((4, 3, 8, 8), 0.3))


@pytest.mark.parametrize("broken", ["twice", "up", "head"])
def test_an_error_in_a_later_layer_restores_the_earlier_ones(made: Made, broken: str) -> None:
    net, images = made
    nn.init.zeros_(scale_of(standardized(net)[broken]))
    with (
        unchanged_but_scales(net, scales_too=True),
        pytest.raises(pws.PwsError, match=f"layer '{broken}' has variance 0"),
    ):
        pws.calibrate(net, images)


def test_one_dead_channel_is_an_error_per_channel_only(made: Made) -> None:
    net, images = made
    scale_of(net.stem).data[2] = 0
    pws.calibrate(deepcopy(net), images)
    with unchanged_but_scales(net, scales_too=True), pytest.raises(pws.PwsError, match="'stem' has variance 0"):
        pws.calibrate(net, images, per_channel=True)


def test_an_error_of_the_model_itself_restores_too(made: Made) -> None:
    net, images = made
    with unchanged_but_scales(net, scales_too=True), pytest.raises(pws.PwsError, match=r"the model takes.* channels"):
        pws.calibrate(nn.Sequential(net.stem, net.stem), images)


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.ReLU())],
    ids=["plain convolution", "no parameters at all"],
)
def test_a_model_without_standardized_layers_is_refused(model: nn.Module) -> None:
    with pytest.raises(pws.PwsError, match="no marked layer and no pws layer that ran"):
        pws.calibrate(model, torch.randn(2, 3, 9, 9))


def test_a_choice_of_no_layer_is_refused(made: Made) -> None:
    net, images = made
    with unchanged_but_scales(net, scales_too=True), pytest.raises(pws.PwsError, match="`only`"):
        pws.calibrate(net, images, only=lambda *_: False)


@pytest.mark.parametrize("target", [0.0, -1.0, float("nan"), float("inf")])
def test_targets_outside_their_range_are_refused(made: Made, target: float) -> None:
    net, images = made
    with pytest.raises(pws.PwsError, match="positive finite target") as caught:
        pws.calibrate(net, images, target=target)
    assert repr(target) in str(caught.value)


def work(rank: int, folder: str) -> None:
    """One of two ranks: calibrate the same nets on a half of the batch, of another size than the other half."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    made = torch.load(f"{folder}/input.pt", weights_only=False)
    scales = {form: scales_on(net, images[:5] if rank == 0 else images[5:]) for form, (net, images) in made.items()}
    torch.save(scales, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def scales_on(net: nn.Module, half: Tensor) -> dict[object, list[Tensor]]:
    scales: dict[object, list[Tensor]] = {}
    for per_channel in (False, True):
        copy = deepcopy(net)
        pws.calibrate(copy, half, per_channel=per_channel)
        scales[per_channel] = [scale_of(layer).detach() for layer in standardized(copy).values()]
        sharded = fully_shard(deepcopy(net), mesh=init_device_mesh("cpu", (2,)))
        pws.calibrate(sharded, half, per_channel=per_channel)
        scales[f"sharded, {per_channel}"] = [scale_of(layer).full_tensor() for layer in standardized(sharded).values()]
    with pytest.raises(pws.PwsError, match="sharded by fully_shard"):
        pws.fold(sharded)
    return scales


Ranks = dict[str, tuple[Made, list[dict[object, list[Tensor]]]]]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """Each form's net and images, and what both ranks made of them: processes take seconds to start."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("ranks")
    # float32 would round away the order of the ranks
    made = {form: (net.double(), images.double()) for form in FORMS for net, images in [make(form)]}
    torch.save(made, folder / "input.pt")
    multiprocessing.spawn(work, (str(folder),), nprocs=2)
    found = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    return {form: (made[form], [rank[form] for rank in found]) for form in FORMS}


@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_agree_to_the_bit_and_with_one_process(form: str, two_ranks: Ranks) -> None:
    (net, images), ranks = two_ranks[form]
    for per_channel in (False, True):
        single = deepcopy(net)
        pws.calibrate(single, images, per_channel=per_channel)
        pairs = zip(standardized(single).values(), *(rank[per_channel] for rank in ranks), strict=True)
        for layer, first, second in pairs:
            assert torch.equal(first, second)
            assert_close(first, scale_of(layer), "float64")
        for rank in ranks:
            for plain, gathered in zip(rank[per_channel], rank[f"sharded, {per_channel}"], strict=True):
                assert_close(gathered, plain, "float64")


def test_both_forms_come_out_the_same() -> None:
    layers, images = (part.double() for part in make("layers"))
    plain = pws.fold(layers)
    for name in ORDER:
        pws.mark(plain.get_submodule(name))
    reports = [pws.calibrate(model, images, per_channel=True, mean=0.1) for model in (layers, plain)]
    assert [entry.layer for entry in reports[0]] == [entry.layer for entry in reports[1]] == ORDER
    for name in ORDER:
        layer, other = layers.get_submodule(name), plain.get_submodule(name)
        assert_close(other.weight, layer.kernel(), "float64")
        if layer.bias is not None:
            assert_close(other.bias, layer.bias, "float64")


def test_a_weight_of_two_layers_is_set_by_the_first() -> None:
    first, second = (pws.mark(nn.Linear(6, 6), reset_parameters=True) for _ in range(2))
    second.weight = first.weight
    images = torch.randn(9, 6)
    report = pws.calibrate(nn.Sequential(first, nn.ReLU(), second), images)
    assert [entry.layer for entry in report] == ["0"]
    assert_close(first(images).var(correction=0), 1.0, "calibrated")


def test_autocast_computes_with_the_new_weights_at_once(made: Made) -> None:
    """It keeps copies of the weights, and would go on with those of before."""
    net, images = made
    net.eval()
    with torch.no_grad():
        with torch.autocast("cpu"):
            before = net(images)
            pws.calibrate(net, images)
            inside = net(images)
        with torch.autocast("cpu"):
            assert torch.equal(net(images), inside)
    assert not torch.equal(before, inside)


def test_a_marked_layer_whose_weight_is_computed_is_refused(made: Made) -> None:
    net = nn.Sequential(pws.mark(nn.Conv2d(3, 8, 3)))
    nn.utils.parametrizations.weight_norm(net[0])
    with pytest.raises(pws.PwsError, match="holds its weight and bias as parameters"):
        pws.calibrate(net, made[1])


class NeedsTargets(nn.Module):
    """As a detector: in training it takes targets, and has a head that eval mode does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = pws.mark(nn.Linear(6, 8)), pws.mark(nn.Linear(8, 4))

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if self.training and targets is None:
            raise ValueError("targets should not be none when in training mode")
        y: Tensor = self.body(x)
        return self.head(y) if self.training else y


def test_layers_that_need_what_only_training_gives_are_left_with_a_warning() -> None:
    model, x = NeedsTargets(), torch.randn(32, 6)
    before = model.head.weight.clone()
    with pytest.warns(UserWarning, match="does not take the batch: targets should not be none"):
        found = pws.calibrate(model, x)
    assert [entry.layer for entry in found] == ["body"]
    assert (model.body(x) - model.body.bias).var(correction=0).item() == pytest.approx(1, rel=1e-4)
    assert torch.equal(model.head.weight, before)
