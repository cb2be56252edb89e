"""`pws.calibrate`: the variance it promises, what it leaves alone, and that ranks agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, distributed, multiprocessing, nn

import pws
from pws.layers import StandardizedLayer


class Net(nn.Module):
    """Every kind of thing `calibrate` must cope with; registered in another order than it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.head = pws.Linear(6, 5)
        self.up = pws.ConvTranspose2d(8, 6, 3, stride=2, groups=2)
        self.plain = nn.Conv2d(8, 8, 1)
        self.twice = pws.Conv2d(8, 8, 3, padding=1, bias=False)
        self.stem = pws.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.stem(images)).relu()
        x = self.drop(self.twice(self.twice(x).relu())).relu()
        return self.head(self.up(self.plain(x).relu()).relu().movedim(1, -1))


ORDER = ["stem", "twice", "up", "head"]


def make() -> tuple[Net, Tensor]:
    """A net whose alphas and biases are not at their initial values, and a batch with a mean."""
    net = Net()
    for layer in pws_layers(net).values():
        nn.init.uniform_(layer.alpha, 0.5, 3)
        if layer.bias is not None:
            nn.init.normal_(layer.bias)
    return net, torch.randn(12, 3, 9, 9) + 0.5


def pws_layers(model: nn.Module) -> dict[str, StandardizedLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, StandardizedLayer)}


@torch.no_grad()
def variances(model: nn.Module, images: Tensor, per_channel: bool = False) -> dict[str, Tensor]:
    """`(channels,)` or `(1,)` for every pws layer: of its first output less its bias, by hooks of our own."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def look(layer: Any, _: Any, output: Tensor) -> None:
            channels = output.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1).double()
            if layer.bias is not None:
                channels = channels - layer.bias[:, None].double()
            rows = channels if per_channel else channels.reshape(1, -1)
            found.setdefault(name, rows.var(1, correction=0))

        return look

    handles = [layer.register_forward_hook(hook(name)) for name, layer in pws_layers(model).items()]
    mode = model.training
    model.eval()(images)
    model.train(mode)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("target", [1.0, 2.0])
def test_every_layer_gets_the_target_variance(target: float, per_channel: bool) -> None:
    net, images = make()
    before = variances(net, images, per_channel)
    pws.calibrate(net, images, target=target, per_channel=per_channel)
    for name, variance in variances(net, images, per_channel).items():
        assert_close(variance, torch.full_like(variance, target), "calibrated")
        assert (before[name] / target - 1).abs().min() > 0.01, (
            f"{name} had the target variance before: nothing is shown"
        )


def test_one_factor_a_layer_unless_per_channel() -> None:
    (net, images), ratios = make(), {}
    for per_channel in (False, True):
        calibrated = deepcopy(net)
        pws.calibrate(calibrated, images, per_channel=per_channel)
        ratios[per_channel] = (calibrated.up.alpha / net.up.alpha).detach()
    assert_close(ratios[False].std() / ratios[False].mean(), 0.0, "float32")
    assert ratios[True].std() > 0.01


def test_the_report_is_in_execution_order_and_says_what_was_done() -> None:
    net, images = make()
    old = {name: layer.alpha.clone() for name, layer in pws_layers(net).items()}
    report = pws.calibrate(net, images)
    assert [entry.layer for entry in report] == ORDER != list(pws_layers(net))
    for entry in report:
        ratio = pws_layers(net)[entry.layer].alpha / old[entry.layer]
        assert_close(ratio, torch.full_like(ratio, entry.factor), "calibrated")
        assert_close(entry.variance * entry.factor**2, 1.0, "calibrated")


def test_later_layers_see_calibrated_earlier_ones() -> None:
    """What the report found for a layer is what it puts out once those that run before it are calibrated."""
    net, images = make()
    stepwise = deepcopy(net)
    for entry in pws.calibrate(net, images):
        found = variances(stepwise, images)[entry.layer]
        assert_close(found, torch.full_like(found, entry.variance), "calibrated")
        pws.calibrate(stepwise, images, only=lambda name, _, now=entry.layer: name == now)


def test_only_the_chosen_layers_change() -> None:
    net, images = make()
    old = {name: layer.alpha.clone() for name, layer in pws_layers(net).items()}
    asked: list[str] = []

    def only(name: str, layer: nn.Module) -> bool:
        asked.append(name)
        assert layer is net.get_submodule(name)
        return isinstance(layer, pws.Conv2d)

    assert [entry.layer for entry in pws.calibrate(net, images, only=only)] == ["stem", "twice"]
    assert sorted(asked) == sorted(ORDER)
    changed = {name for name, layer in pws_layers(net).items() if not torch.equal(layer.alpha, old[name])}
    assert changed == {"stem", "twice"}


@pytest.mark.parametrize("per_channel", [False, True])
def test_deterministic_and_idempotent(per_channel: bool) -> None:
    net, images = make()
    copies = [deepcopy(net) for _ in range(2)]
    for copy in copies:
        pws.calibrate(copy, images, per_channel=per_channel)
    again = deepcopy(copies[0])
    report = pws.calibrate(again, images, per_channel=per_channel)
    for name in ORDER:
        alpha = pws_layers(copies[0])[name].alpha
        assert torch.equal(alpha, pws_layers(copies[1])[name].alpha)
        assert_close(pws_layers(again)[name].alpha, alpha, "calibrated")
    assert all(entry.factor == pytest.approx(1, rel=1e-5) for entry in report)


BATCHES: dict[str, Callable[[Tensor], Any]] = {
    "list of tensors": lambda images: [images[:5], images[5:]],
    "tuples that start with the input": lambda images: [(images[:5], torch.zeros(5)), (images[5:], torch.zeros(7))],
    "lists": lambda images: [[images, "label"]],
    "generator": lambda images: (part for part in images.split(4)),
    "data loader": lambda images: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), batch_size=5),
}


@pytest.mark.parametrize("form", BATCHES)
def test_batches_are_joined(form: str) -> None:
    net, images = make()
    other = deepcopy(net)
    pws.calibrate(net, images)
    pws.calibrate(other, BATCHES[form](images))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


@contextmanager
def unchanged_but_alpha(model: nn.Module, *, alpha_too: bool = False) -> Iterator[None]:
    """Asserts that modes, buffers, parameters, flags, hooks and the random state are the same after as before."""

    def state() -> dict[str, Any]:
        tensors = {
            name: (id(t), t.clone(), t.requires_grad, t.grad)
            for name, t in [*model.named_parameters(), *model.named_buffers()]
            if alpha_too or not name.endswith("alpha")
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
def test_all_but_alpha_is_left_alone(training: bool) -> None:
    net, images = make()
    net.train(training)
    net.norm.train(not training)
    net.stem.register_forward_hook(lambda *_: None)
    with unchanged_but_alpha(net):
        pws.calibrate(net, images)
    assert all(layer.alpha.requires_grad and layer.alpha.is_leaf for layer in pws_layers(net).values())


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
def test_unusable_batches_are_refused_and_change_nothing(case: str) -> None:
    net, images = make()
    with unchanged_but_alpha(net, alpha_too=True), pytest.raises(pws.PwsError, match="calibrate needs"):
        pws.calibrate(net, UNUSABLE[case](images))


def test_a_constant_image_is_refused_not_amplified() -> None:
    """A kernel that sums to 0 answers a constant with rounding noise, whose variance is 1e-15 and not exactly 0."""
    net = nn.Sequential(pws.Conv2d(3, 8, 3))
    with unchanged_but_alpha(net, alpha_too=True), pytest.raises(pws.PwsError, match="output that varies"):
        pws.calibrate(net, torch.full((4, 3, 8, 8), 0.3))


@pytest.mark.parametrize("broken", ["twice", "up", "head"])
def test_an_error_in_a_later_layer_restores_the_earlier_ones(broken: str) -> None:
    net, images = make()
    nn.init.zeros_(pws_layers(net)[broken].alpha)
    with (
        unchanged_but_alpha(net, alpha_too=True),
        pytest.raises(pws.PwsError, match=f"layer '{broken}' has variance 0"),
    ):
        pws.calibrate(net, images)


def test_one_dead_channel_is_an_error_per_channel_only() -> None:
    net, images = make()
    net.stem.alpha.data[2] = 0
    pws.calibrate(deepcopy(net), images)
    with unchanged_but_alpha(net, alpha_too=True), pytest.raises(pws.PwsError, match="'stem' has variance 0"):
        pws.calibrate(net, images, per_channel=True)


def test_an_error_of_the_model_itself_restores_too() -> None:
    net, images = make()
    with unchanged_but_alpha(net, alpha_too=True), pytest.raises(RuntimeError, match="channels"):
        pws.calibrate(nn.Sequential(net.stem, net.stem), images)


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.ReLU())],
    ids=["plain convolution", "no parameters at all"],
)
def test_a_model_without_pws_layers_is_refused(model: nn.Module) -> None:
    with pytest.raises(pws.PwsError, match="no pws layer that ran"):
        pws.calibrate(model, torch.randn(2, 3, 9, 9))


def test_a_choice_of_no_layer_is_refused() -> None:
    net, images = make()
    with unchanged_but_alpha(net, alpha_too=True), pytest.raises(pws.PwsError, match="`only`"):
        pws.calibrate(net, images, only=lambda *_: False)


@pytest.mark.parametrize("target", [0.0, -1.0, float("nan"), float("inf")])
def test_targets_outside_their_range_are_refused(target: float) -> None:
    net, images = make()
    with pytest.raises(pws.PwsError, match="positive finite target") as caught:
        pws.calibrate(net, images, target=target)
    assert repr(target) in str(caught.value)


def work(rank: int, folder: str) -> None:
    """One of two ranks: calibrate the same net on a half of the batch, of another size than the other half."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    net, images = torch.load(f"{folder}/input.pt", weights_only=False)
    half = images[:5] if rank == 0 else images[5:]
    alphas = {}
    for per_channel in (False, True):
        copy = deepcopy(net)
        pws.calibrate(copy, half, per_channel=per_channel)
        alphas[per_channel] = [layer.alpha.detach() for layer in pws_layers(copy).values()]
    torch.save(alphas, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks_agree_to_the_bit_and_with_one_process(tmp_path: Path) -> None:
    net, images = (part.double() for part in make())  # a float32 alpha would round away the order of the ranks
    torch.save((net, images), tmp_path / "input.pt")
    multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for per_channel in (False, True):
        single = deepcopy(net)
        pws.calibrate(single, images, per_channel=per_channel)
        pairs = zip(pws_layers(single).values(), *(rank[per_channel] for rank in ranks), strict=True)
        for layer, first, second in pairs:
            assert torch.equal(first, second)
            assert_close(first, layer.alpha, "float64")
