"""Private runs: what Opacus does in them against gradients of single images by autograd; which images a batch holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_private import Points, network, settings
from torch import Tensor, nn
from torch.nn import functional as F

from pws.training import Recipe, fit
from pws.training.data import seeded
from pws.training.samplers import PoissonSampler


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
