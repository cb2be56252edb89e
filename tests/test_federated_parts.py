"""How images are divided among clients, and what each client's images look like."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from pws import PwsError
from pws.federated.images import ClientImages, labels_of
from pws.federated.partition import partition
from pws.federated.skew import DARKEST, changes_of, check_skew
from pws.training.datasets import digit_arrays
from pws.training.images import TensorImages

LABELS = digit_arrays()[0][1]


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randint(0, 256, (4, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("alpha", [None, 0.01, 0.1, 1.0, 1e6])
@pytest.mark.parametrize(("clients", "least"), [(1, 8), (7, 1), (40, 32)])
def test_each_image_has_one_client_and_each_client_a_batch(alpha: float | None, clients: int, least: int) -> None:
    shares = partition(LABELS, clients, alpha, least, seed=3)
    assert len(shares) == clients
    assert sorted(number for share in shares for number in share) == list(range(len(LABELS)))
    assert min(map(len, shares)) >= least


def classes_of(share: list[int]) -> Counter[int]:
    return Counter(LABELS[share].tolist())


def test_a_small_alpha_gives_few_classes_and_a_large_one_all_in_equal_parts() -> None:
    few = partition(LABELS, 10, 0.01, 1, seed=0)
    # Each class has about one owner: 10 classes and 10 clients make one or two classes a client.
    assert np.mean([sum(count > 5 for count in classes_of(share).values()) for share in few]) < 2
    even = [classes_of(share) for share in partition(LABELS, 10, 1e7, 1, seed=0)]
    for label in range(10):
        counts = [classes[label] for classes in even]
        assert min(counts) >= 13
        assert max(counts) - min(counts) <= 1
    sizes = [len(share) for share in partition(LABELS, 10, None, 1, seed=0)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_shares_have_the_moments_of_dirichlet(alpha: float) -> None:
    """The share of a class at a client has mean 1 / K and variance (K - 1) / (K^2 (K alpha + 1))."""
    clients, labels = 5, torch.zeros(10_000)
    drawn = np.array([[len(s) for s in partition(labels, clients, alpha, 1, seed)] for seed in range(400)]) / 10_000
    wanted = (clients - 1) / (clients**2 * (clients * alpha + 1))
    assert drawn.mean() == pytest.approx(1 / clients)
    assert drawn.var() == pytest.approx(wanted, rel=0.12)


def test_the_seed_decides() -> None:
    assert partition(LABELS, 4, 0.5, 1, seed=1) == partition(LABELS, 4, 0.5, 1, seed=1)
    assert partition(LABELS, 4, 0.5, 1, seed=1) != partition(LABELS, 4, 0.5, 1, seed=2)


def test_too_many_clients_are_refused() -> None:
    with pytest.raises(PwsError, match=r"100 clients \(federated.clients\) times 32 .* there are 1,437"):
        partition(LABELS, 100, 0.1, 32, seed=0)


def test_rotation_goes_up_to_a_right_angle(pixels: Tensor) -> None:
    changes = changes_of("rotate", 2)
    assert torch.equal(changes[0](pixels, [0]), pixels)
    spot = torch.zeros(1, 1, 15, 15, dtype=torch.uint8)
    spot[0, 0, 7, 12] = 255  # right of the middle; turned by 45 degrees it lies above, at the right
    turned = changes[1](spot, [0])[0, 0].float()
    row, column = divmod(int(turned.argmax()), 15)
    assert row < 7 < column


def test_the_last_client_is_the_darkest(pixels: Tensor) -> None:
    first, *_, last = changes_of("dark", 5)
    assert torch.equal(first(pixels, range(4)), pixels)
    assert torch.equal(last(pixels, range(4)), (pixels * DARKEST).round().to(torch.uint8))


def test_domains_come_one_after_the_other(pixels: Tensor) -> None:
    same, inverted, blurred, noisy, again = changes_of("domains", 5)
    assert torch.equal(same(pixels, range(4)), pixels)
    assert torch.equal(inverted(pixels, range(4)), TF.invert(pixels))
    assert blurred(pixels, range(4)).float().var() < 0.7 * pixels.float().var()
    assert torch.equal(again(pixels, range(4)), pixels)
    grey = torch.full((3, 1, 32, 32), 128, dtype=torch.uint8)
    noise = noisy(grey, [5, 6, 5])
    assert 40 < float(noise.float().std()) < 55
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize("skew", ["rotate", "dark", "domains"])
def test_images_that_are_no_bytes_are_refused(skew: str, pixels: Tensor) -> None:
    check_skew("none", pixels.float())
    check_skew(skew, pixels)
    with pytest.raises(PwsError, match=f"federated.skew {skew} changes images of bytes, and these are float32"):
        check_skew(skew, pixels.float())


def test_a_clients_images_are_those_of_its_numbers(pixels: Tensor) -> None:
    images = TensorImages(pixels, torch.tensor([3, 1, 4, 1]))
    assert labels_of(images).tolist() == [3, 1, 4, 1]
    own = ClientImages(images, [3, 0], changes_of("domains", 2)[1:])
    found, labels = own.get([0, 1])
    assert len(own) == 2
    assert labels.tolist() == [1, 3]
    assert torch.equal(found, 255 - pixels[[3, 0]])


def test_tested_images_go_through_the_clients_changes_in_turn(pixels: Tensor) -> None:
    dealt = ClientImages(TensorImages(pixels, torch.zeros(4)), range(4), changes_of("domains", 2))
    found, _ = dealt.get([0, 1, 2, 3])
    assert torch.equal(found[::2], pixels[::2])
    assert torch.equal(found[1::2], 255 - pixels[1::2])
