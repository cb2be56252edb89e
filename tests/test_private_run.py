"""Private runs: what Opacus does in them against gradients of single images by autograd, and what they count and keep."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from opacus.optimizers import DPOptimizer
from small_runs import arguments, weights
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import pws
from pws.cli import main
from pws.training import DataConfig, OptimConfig, PrivacyConfig, Recipe, TrainerConfig, fit, load_recipe, train
from pws.training.data import seeded
from pws.training.network import method_for
from pws.training.private.classifier import PrivateClassifier
from pws.training.private.engine import Accounting
from pws.training.samplers import PoissonSampler
from pws.training.tasks import trained_task

TINY = (
    *(
        "--data.name=digits",
        "--data.image_size=12",
        "--data.train_images=128",
        "--data.batch_size=32",
        "--data.validation=0",
    ),
    *("--model.width=0.08", "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.epochs=2"),
    *("--optim.lr=0.3", "--optim.momentum=0.5", "--optim.schedule=constant", "--data.augment=false"),
)
NOISY = ("--privacy.noise=1.0", "--privacy.delta=0.001")
SILENT = ("--privacy.noise=0", "--privacy.delta=0.001")


def tiny(*flags: str) -> Recipe:
    return load_recipe("fashion-mnist-allconv-pws", *TINY, *flags)


class Points(Dataset[Any]):
    """Points of four numbers in three classes, with a copy's shift drawn from torch's generator if wanted."""

    def __init__(self, count: int, *, shifted: bool = False) -> None:
        generator = torch.Generator().manual_seed(7)
        self.inputs = torch.randn(count, 4, generator=generator, dtype=torch.float64)
        self.labels = torch.randint(3, (count,), generator=generator)
        self.shifted = shifted

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        shift = torch.randn(4, dtype=torch.float64) if self.shifted else 0.0
        return self.inputs[number] + shift, int(self.labels[number])


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def settings(**privacy: Any) -> Recipe:
    return Recipe(
        data=DataConfig(batch_size=8, validation=0.0, augment=True),  # the points draw their own
        optim=OptimConfig(lr=0.5, momentum=0.0, weight_decay=0.0, schedule="constant"),
        trainer=TrainerConfig(accelerator="cpu", devices=1, precision="64-true", epochs=2),
        privacy=PrivacyConfig(noise=0.0, delta=1e-3, **privacy),
    )


def convolutions() -> nn.Sequential:
    """In the memory format of a recipe's networks."""
    torch.manual_seed(3)
    net = nn.Sequential(
        *(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 2), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(8, 3)),
    )
    return net.double().to(memory_format=torch.channels_last)


def by_hand(net: nn.Sequential, recipe: Recipe, data: Points, clip: float) -> nn.Sequential:
    """DP-SGD without noise: each image's gradient by a backward pass of its own."""
    copies = recipe.privacy.augmentations
    sampler = PoissonSampler(len(data), 8, seed=0, repeats=copies)
    expected = len(data) // len(sampler)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for _, numbers in sampler:
            total = [torch.zeros_like(p) for p in net.parameters()]
            for start in range(0, len(numbers), copies):
                losses = []
                for number in numbers[start : start + copies]:
                    point, label = seeded_point(data, epoch, number)
                    losses.append(F.cross_entropy(net(point[None]), torch.tensor([label])))
                gradients = torch.autograd.grad(torch.stack(losses).mean(), list(net.parameters()))
                norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
                for kept, gradient in zip(total, gradients, strict=True):
                    kept += gradient * min(1.0, clip / (norm + 1e-6))
            with torch.no_grad():
                for parameter, gradient in zip(net.parameters(), total, strict=True):
                    parameter -= 0.5 * gradient / expected
    return net


def seeded_point(data: Points, epoch: int, number: int) -> tuple[Tensor, int]:
    with seeded(0, epoch, number):
        return data[number % len(data)]


@pytest.mark.parametrize(
    ("privacy", "clip"),
    [
        ({"clip_norm": 0.3}, 0.3),
        ({"clip_norm": 1e6}, 1e6),
        ({"clip_norm": 0.3, "physical_batch_size": 3}, 0.3),
        ({"clip_norm": 0.3, "mode": "ghost"}, 0.3),
        ({"clip_norm": 0.3, "mode": "ghost", "physical_batch_size": 3}, 0.3),
        ({"clip_norm": 0.3, "augmentations": 4}, 0.3),
        ({"clip_norm": 0.3, "augmentations": 4, "physical_batch_size": 10}, 0.3),
    ],
)
@pytest.mark.parametrize("make", [network, convolutions])
def test_a_step_is_the_mean_of_clipped_gradients(
    make: Callable[[], nn.Sequential], privacy: dict[str, Any], clip: float, tmp_path: Path
) -> None:
    copies = privacy.get("augmentations", 1)
    data, net, recipe = Points(30, shifted=copies > 1), make(), settings(**privacy)
    summary = fit(net, data, Points(6), recipe, tmp_path / "run", quiet=True)
    assert summary.steps == 8
    for found, wanted in zip(net.parameters(), by_hand(make(), recipe, data, clip).parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


def test_batches_hold_each_image_on_its_own() -> None:
    sampler = PoissonSampler(1000, 100, seed=0, repeats=2)
    batches = []
    for epoch in range(30):
        sampler.set_epoch(epoch)
        batches += [numbers for _, numbers in sampler]
    drawn = torch.zeros(len(batches), 2000)
    for row, numbers in zip(drawn, batches, strict=True):
        row[numbers] = 1
    assert torch.equal(drawn[:, :1000], drawn[:, 1000:])
    assert all(numbers[1::2] == [number + 1000 for number in numbers[::2]] for numbers in batches)
    images = drawn[:, :1000]
    assert float(images.mean()) == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / images.numel()))
    # Binomial sizes, as a shuffled order cut into batches has not; an image may be in no batch of an epoch, or in several.
    assert float(images.sum(1).var()) == pytest.approx(90, rel=0.35)
    times = images.unflatten(0, (30, 10)).sum(1)
    assert float((times == 0).float().mean()) == pytest.approx(0.9**10, abs=0.02)
    assert float((times > 1).float().mean()) == pytest.approx(1 - 0.9**10 - 0.9**9, abs=0.02)


def test_batches_are_not_drawn_from_the_numbers_of_the_noise() -> None:
    """A step draws its noise after torch.manual_seed(its number), with seed 0 in the first epoch."""
    for epoch in range(10):
        sampler = PoissonSampler(1000, 100, seed=0, repeats=1)
        sampler.set_epoch(epoch)
        _, numbers = next(iter(sampler))
        same = torch.rand(1000, generator=torch.Generator().manual_seed(epoch)) < 0.1
        assert numbers != same.nonzero().flatten().tolist()


def test_a_resumed_sampler_goes_on_with_the_same_batches() -> None:
    sampler = PoissonSampler(50, 8, seed=3, repeats=1)
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.start_at(2, 4)
    assert list(sampler) == whole[4:]
    assert len(sampler) == len(whole) == 7


def test_the_summary_states_what_was_spent(tmp_path: Path) -> None:
    """Steps on all images together are one Gaussian mechanism, whose privacy has a closed form: Balle and Wang 2018."""
    summary = train(tiny(*NOISY, "--data.batch_size=128", "--trainer.max_steps=2"), tmp_path / "run", quiet=True)
    assert summary.privacy is not None
    epsilon, delta, mu = summary.privacy.epsilon, 0.001, math.sqrt(2)
    assert epsilon is not None
    normal = torch.distributions.Normal(0.0, 1.0)

    def cdf(x: float) -> float:
        return float(normal.cdf(torch.tensor(x, dtype=torch.float64)))

    def exact(epsilon: float) -> float:
        return cdf(-epsilon / mu + mu / 2) - math.exp(epsilon) * cdf(-epsilon / mu - mu / 2)

    # The accountant's epsilon is at most 0.01 too large, and never too small.
    assert exact(epsilon) <= delta <= exact(epsilon - 0.02)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["privacy"] == {
        **{"epsilon": epsilon, "delta": delta, "noise": 1.0, "clip_norm": 1.0},
        **{"sample_rate": 1.0, "steps": 2, "accountant": "prv"},
    }


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_the_noise_for_an_epsilon_spends_it(accountant: str, tmp_path: Path) -> None:
    flags = ("--privacy.epsilon=3", "--privacy.delta=0.001", f"--privacy.accountant={accountant}")
    summary = train(tiny(*flags), tmp_path / "run", quiet=True)
    assert summary.privacy is not None
    assert summary.privacy.epsilon is not None
    assert 2.9 < summary.privacy.epsilon <= 3.0


def test_a_run_that_was_not_private_states_nothing(tmp_path: Path) -> None:
    assert train(tiny(), tmp_path / "run", quiet=True).privacy is None


@pytest.mark.parametrize("steps", [None, 3])
def test_a_resumed_run_ends_with_the_same_weights_and_privacy(
    steps: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(*NOISY, *(() if steps is None else (f"--trainer.checkpoint_steps={steps}",)))
    whole = train(recipe, tmp_path / "whole", quiet=True)
    step, original = 6, PrivateClassifier.training_step

    def stopped(self: PrivateClassifier, batch: Any, number: int) -> Any:
        if self.trainer.global_step == step:
            raise KeyboardInterrupt
        return original(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(PrivateClassifier, "training_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "run", quiet=True)
    resumed = train(recipe, tmp_path / "run", resume=True, quiet=True)
    assert resumed.privacy == whole.privacy
    wanted = weights(tmp_path / "whole")
    assert all(torch.equal(value, wanted[name]) for name, value in weights(tmp_path / "run").items())


def test_batches_without_images_take_a_step_of_noise_alone(tmp_path: Path) -> None:
    summary = train(
        tiny(*NOISY, "--data.batch_size=1", "--trainer.max_steps=40", "--data.augment=true"),
        tmp_path / "run",
        quiet=True,
    )
    assert summary.steps == 40  # a batch is empty with probability 0.37
    assert summary.privacy is not None
    assert summary.privacy.steps == 40


@pytest.mark.parametrize("form", ["optimizer", "layers"])
def test_the_recipes_own_bound_holds_behind_the_noise(form: str, tmp_path: Path) -> None:
    bound = 0.001
    flags = (
        *NOISY,
        f"--model.form={form}",
        f"--optim.step_bound={bound}",
        "--trainer.max_steps=1",
        "--optim.momentum=0",
    )
    recipe = tiny(*flags, "--optim.weight_decay=0")
    train(recipe, tmp_path / "run", quiet=True)
    free = tiny(*flags[:-2], "--optim.step_bound=null", *flags[-2:], "--optim.weight_decay=0")
    train(free, tmp_path / "free", quiet=True)
    moved = {name: lengths(tmp_path / name, recipe) for name in ("run", "free")}
    assert all(short < long for short, long in zip(moved["run"], moved["free"], strict=True))
    if form == "layers":  # here the weight is what the bound is on
        assert all(length <= bound * (1 + 1e-3) for length in moved["run"])
        assert min(moved["free"]) > bound


def lengths(run: Path, recipe: Recipe) -> list[float]:
    """How far each weight moved in the run."""
    task = trained_task(recipe)
    data = task.data(recipe.data, recipe.seed)
    seed_everything(recipe.seed, verbose=False)
    start = task.network(recipe.model, data, method_for(recipe.model)).state_dict()
    found = {name.removeprefix("model."): value for name, value in weights(run).items()}
    return [float((value - start[name]).norm()) for name, value in found.items() if name.endswith("weight")]


WRONG = {
    "task": ("--task=detect", "task"),
    "mixup": ("--data.mixup_alpha=0.2", "data.mixup_alpha"),
    "cutmix": ("--data.cutmix_alpha=0.2", "data.cutmix_alpha"),
    "clip_norm": ("--optim.clip_norm=1", "privacy.clip_norm"),
    "accumulate": ("--trainer.accumulate=2", "physical_batch_size"),
    "compile": ("--trainer.compile=true", "trainer.compile"),
    "activations": ("--trainer.checkpoint_activations=true", "checkpoint_activations"),
    "half": ("--trainer.precision=16-mixed", "bf16-mixed"),
    "processes": ("--trainer.devices=2", "one process"),
    "sharded": ("--trainer.strategy=fsdp2", "one process"),
    "both": ("--privacy.epsilon=1", "give one"),
    "delta": ("--privacy.delta=0.01", "1 / 128"),
    "clip": ("--privacy.clip_norm=0", "positive"),
    "copies": ("--privacy.augmentations=4", "no augmentation"),
    "batch": ("--data.batch_size=200", "128"),
    "bn": ("--model.method=bn", "mix the images of a batch"),
    "gc": ("--model.method=gc", "gc would be none"),
    "ghost": ("--privacy.mode=ghost --trainer.precision=bf16-mixed", "rounds in different ways"),
    "monitor": ("--monitor=1", "--monitor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_impossible_setting_is_one_clear_error(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flag, said = WRONG[name]
    assert main(arguments(tmp_path / "run", *TINY, *NOISY, *flag.split())) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_a_frozen_batch_norm_is_refused_too(kind: type[nn.BatchNorm1d], affine: bool, tmp_path: Path) -> None:
    """It mixes the images of a batch, whether it is trained or not, and Opacus looks at trained modules alone."""
    model = nn.Sequential(nn.Linear(4, 8), kind(8, affine=affine).requires_grad_(False), nn.Linear(8, 3)).double()
    with pytest.raises(pws.PwsError, match="leaves 1 modules that mix the images of a batch"):
        fit(model, Points(40), Points(8), settings(), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_trained_module_with_buffers_is_refused(tmp_path: Path) -> None:
    model = network()
    model[0].register_buffer("seen", torch.zeros(1))
    with pytest.raises(pws.PwsError, match="has trained parameters beside the buffers seen"):
        fit(model, Points(40), Points(8), settings(), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_the_rate_that_is_counted_is_that_of_the_batches() -> None:
    """93 batches per epoch: the floating-point number 1 / (1 / 93) lies below 93."""
    net, accounting = network(), Accounting(PrivacyConfig(noise=1.0, delta=1e-4))
    optimizer, criterion = accounting.attach(
        net, torch.optim.SGD(net.parameters(), lr=0.1), nn.CrossEntropyLoss(), 930, 10, 5
    )
    criterion(net(torch.randn(3, 4).double()), torch.tensor([0, 1, 2])).backward()
    optimizer.step()
    assert accounting.engine.accountant.history == [(1.0, 1 / 93, 1)]
    assert (accounting.spent().sample_rate, optimizer.expected_batch_size) == (1 / 93, 10)


def test_a_private_run_takes_one_device_by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    class AskedError(Exception):
        pass

    def trainer(**settings: Any) -> None:
        asked.append(settings["devices"])
        raise AskedError

    monkeypatch.setattr(pws.training.run, "Trainer", trainer)
    for number, flags in enumerate((NOISY, ())):
        with pytest.raises(AskedError):
            train(tiny(*flags, "--trainer.devices=auto"), tmp_path / str(number), quiet=True)
    assert asked == [1, "auto"]


def test_rounded_gradients_are_clipped_in_full_precision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = set()
    clip = DPOptimizer.clip_and_accumulate

    def clipped(self: DPOptimizer) -> None:
        seen.update(gradient.dtype for gradient in self.grad_samples)
        clip(self)

    monkeypatch.setattr(DPOptimizer, "clip_and_accumulate", clipped)
    train(tiny(*NOISY, "--trainer.precision=bf16-mixed", "--trainer.max_steps=1"), tmp_path / "run", quiet=True)
    assert seen == {torch.float32}


def test_an_epsilon_that_no_noise_gives_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(tmp_path / "run", *TINY, "--privacy.epsilon=0.0001", "--privacy.delta=1e-9")) == 2
    assert "larger epsilon" in capsys.readouterr().err


def test_scales_are_set_on_noise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is set from private images is not accounted for."""
    seen: list[Tensor] = []
    original = pws.training.module.calibrate

    def calibrate(model: Any, batches: Any, **options: Any) -> Any:
        seen.extend(batches)
        return original(model, batches, **options)

    monkeypatch.setattr(pws.training.module, "calibrate", calibrate)
    train(tiny(*NOISY, "--model.calibrate=all", "--trainer.max_steps=1"), tmp_path / "run", quiet=True)
    (images,) = seen
    assert float(images.mean()) == pytest.approx(0, abs=0.1)
    assert float(images.std()) == pytest.approx(1, abs=0.1)
    assert len(images.unique()) > images.numel() / 2  # those of digits hold 17 values
