"""Augmentation beyond crop and flip: equal to torchvision's own, whatever the workers, processes and restarts."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_data import write_folder, write_npz
from torch import Tensor
from torchvision.transforms import v2

from pws._errors import PwsError
from pws.training import Recipe, train
from pws.training.classifier import Classifier
from pws.training.data import ImageBatches, ImageData
from pws.training.images import TensorImages
from pws.training.recipe import DataConfig, OptimConfig
from pws.training.recipe_file import recipe_of
from pws.training.samplers import TrainSampler

SMOOTH: dict[str, Any] = {"interpolation": v2.InterpolationMode.BILINEAR}
RA, WIDE, ERASE = v2.RandAugment(magnitude=15, **SMOOTH), v2.TrivialAugmentWide(**SMOOTH), v2.RandomErasing(p=0.5)
ALL: dict[str, Any] = {
    **{"augment": True, "auto_augment": "ra", "random_erase": 0.5, "mixup_alpha": 0.2, "cutmix_alpha": 1.0},
    **{"ra_reps": 2, "batch_size": 32, "train_images": 128},
}


def data_with(**settings: Any) -> ImageData:
    return ImageData(DataConfig(**{"name": "digits", "validation": 0.0, **settings}), seed=3)


def images_of(data: ImageData) -> TensorImages:
    assert isinstance(data.splits.train, TensorImages)
    return data.splits.train


def batches_of(data: ImageData) -> ImageBatches:
    return data.batches(data.splits.train, train=True)


def seed_as_documented(epoch: int, number: int) -> None:
    """(seed, epoch, image) with the seed of `data_with`."""
    torch.manual_seed((3 * 1_000_003 + epoch) * 1_000_000_007 + number)


def normalized(pixels: Tensor, data: ImageData) -> Tensor:
    scaled = v2.functional.to_dtype(pixels, torch.float32, scale=True)
    return v2.functional.normalize(scaled, list(data.splits.mean), list(data.splits.std))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"auto_augment": "ra", "ra_magnitude": 15}, [RA]),
        ({"auto_augment": "ta_wide"}, [WIDE]),
        ({"random_erase": 0.5}, []),
        (
            {"augment": True, "auto_augment": "ra", "ra_magnitude": 15, "random_erase": 0.5},
            [v2.RandomCrop((16, 16), padding=[2, 2]), v2.RandomHorizontalFlip(), RA],
        ),
    ],
)
def test_images_are_those_of_torchvision(
    settings: dict[str, Any], steps: list[Any], channels: int, tmp_path: Path
) -> None:
    write_npz(tmp_path / "a.npz", channels=channels, count=20)
    data = data_with(name="npz", root=str(tmp_path / "a.npz"), **settings)
    numbers = list(range(20))
    found, labels = batches_of(data)[5, numbers]
    assert labels.tolist() == [*range(10), *range(10)]
    plain = normalized(images_of(data).pixels, data)
    for number in numbers:
        seed_as_documented(5, number)
        image = images_of(data).pixels[number]
        for step in steps:
            image = step(image)
        expected = normalized(image, data)
        if "random_erase" in settings:
            expected = ERASE(expected)
        torch.testing.assert_close(found[number], expected, rtol=0, atol=1e-6)
    changed = (found - plain).abs().amax((1, 2, 3)) > 1e-6
    assert 5 <= int(changed.sum()) <= 20, "about half are erased, most are changed by the others"
    if settings == {"random_erase": 0.5}:
        assert int(changed.sum()) < 20
        assert (found[changed] == 0).flatten(1).any(1).all()


@pytest.mark.parametrize("augment", [False, True])
def test_images_in_files(augment: bool, tmp_path: Path) -> None:
    write_folder(tmp_path, classes=2, images=3, side=40)
    settings = {"name": "folder", "root": str(tmp_path), "image_size": 32, "augment": augment, "auto_augment": "ra"}
    data = data_with(**settings, ra_magnitude=15)
    found, _ = batches_of(data)[0, [1, 4]]
    files = data.splits.train.files  # type: ignore[attr-defined]
    prepare = v2.Compose([v2.Resize(round(32 * 256 / 224)), v2.CenterCrop(32)])
    moves = v2.Compose([v2.RandomResizedCrop(32), v2.RandomHorizontalFlip()]) if augment else prepare
    for place, number in enumerate((1, 4)):
        seed_as_documented(0, number)
        image = RA(moves(v2.functional.pil_to_tensor(files[number][0])))
        torch.testing.assert_close(found[place], normalized(image, data), rtol=0, atol=1e-6)


def test_mixup_gives_labels_the_shares_of_the_images() -> None:
    plain, _ = batches_of(data_with())[0, list(range(8))]
    mixed, labels = batches_of(data_with(mixup_alpha=1.0))[0, list(range(8))]
    hard = images_of(data_with()).labels[:8]
    for number in range(8):
        own, other, found = (image.double().flatten() for image in (plain[number], plain[number - 1], mixed[number]))
        share = float(torch.dot(found - other, own - other) / torch.dot(own - other, own - other))
        assert 0.02 < share < 0.98
        torch.testing.assert_close(found, share * own + (1 - share) * other, rtol=0, atol=1e-6)
        expected = torch.zeros(10, dtype=torch.float64)
        expected[hard[number]] += share
        expected[hard[number - 1]] += 1 - share
        torch.testing.assert_close(labels[number].double(), expected, rtol=0, atol=1e-6)


def test_cutmix_gives_labels_the_shares_of_the_area(tmp_path: Path) -> None:
    pixels = np.broadcast_to(np.arange(8, dtype=np.uint8)[:, None, None] * 20, (8, 16, 16))  # a grey of its own each
    parts = {"train_images": pixels, "test_images": pixels}
    np.savez(tmp_path / "a.npz", **parts, train_labels=np.arange(8), test_labels=np.arange(8))
    settings = {"name": "npz", "root": str(tmp_path / "a.npz")}
    plain, _ = batches_of(data_with(**settings))[0, list(range(8))]
    seen = set()
    for epoch in range(5):
        mixed, labels = batches_of(data_with(**settings, cutmix_alpha=1.0))[epoch, list(range(8))]
        for number in range(8):
            own = float((mixed[number] == plain[number]).double().mean())
            assert float((mixed[number] == plain[number - 1]).double().mean()) == 1 - own
            assert labels[number, number].item() == pytest.approx(own, abs=1e-6)
            assert labels[number, number - 1].item() == pytest.approx(1 - own, abs=1e-6)
            seen.add(own)
    assert len(seen) > 1


def test_with_both_each_batch_has_one_of_them_as_torchvision_draws_it() -> None:
    both = v2.RandomChoice([v2.MixUp(alpha=0.2, num_classes=10), v2.CutMix(alpha=1.0, num_classes=10)])
    data, plain = data_with(mixup_alpha=0.2, cutmix_alpha=1.0), data_with()
    cuts = 0
    for epoch in range(12):
        found, labels = batches_of(data)[epoch, [7, 2, 5, 11]]
        images, hard = batches_of(plain)[epoch, [7, 2, 5, 11]]
        seed_as_documented(epoch, -1 - 7)
        expected, shares = both(images, hard)
        assert torch.equal(found, expected)
        assert torch.equal(labels, shares)
        cuts += int(((found == images) | (found == images.roll(1, 0))).all())
    assert 1 <= cuts <= 11


def test_the_loss_takes_shares_and_smooths_them() -> None:
    images, labels = batches_of(data_with(mixup_alpha=1.0))[0, list(range(8))]
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    loss = Classifier(network, OptimConfig(label_smoothing=0.1), 10).losses((images, labels))["loss"]
    smooth = 0.9 * labels.double() + 0.1 / 10
    expected = -(smooth * network.double()(images.double()).log_softmax(1)).sum() / 8
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_repeated_augmentation_is_torchvisions_sampler() -> None:
    sampler = TrainSampler(50, 8, seed=3, rank=0, world=1, accumulate=1)
    order = [number for _, numbers in sampler for number in numbers]
    copies = [number for number in order for _ in range(3)]
    steps = list(TrainSampler(50, 8, seed=3, rank=0, world=1, accumulate=1, repeats=3))
    assert len(steps) == len(sampler) == 6
    for step, (_, numbers) in enumerate(steps):
        assert sorted(number % 50 for number in numbers) == sorted(copies[step * 8 : step * 8 + 8])
    drawn = [number for _, numbers in steps for number in numbers]
    assert len(set(drawn)) == 48
    assert {number // 50 for number in drawn} == {0, 1, 2}


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (2, 2)])
def test_copies_are_shared_out_and_do_not_stand_side_by_side(world: int, accumulate: int) -> None:
    settings: dict[str, Any] = {"seed": 3, "accumulate": accumulate, "repeats": 4}
    whole = list(TrainSampler(64, 32, seed=3, rank=0, world=1, accumulate=1, repeats=4))
    shares = [list(TrainSampler(64, 32, rank=rank, world=world, **settings)) for rank in range(world)]
    for step, (_, batch) in enumerate(whole):
        parts = [part for share in shares for _, part in share[step * accumulate : (step + 1) * accumulate]]
        assert sorted(number for part in parts for number in part) == sorted(batch)
        for part in (batch, *parts):
            images = [number % 64 for number in part]
            assert all(a != b for a, b in pairwise(images))


def test_copies_are_augmented_each_in_its_way() -> None:
    data = data_with(augment=True, auto_augment="ra", ra_reps=3)
    count = len(data.splits.train)
    images, labels = batches_of(data)[0, [7, count + 7, 2 * count + 7]]
    assert len(torch.unique(images, dim=0)) == 3
    assert labels.unique().numel() == 1
    alone, _ = batches_of(data)[0, [count + 7]]
    assert torch.equal(images[1], alone[0])


def test_two_processes_have_the_images_of_one() -> None:
    config = {**ALL, "mixup_alpha": 0.0, "cutmix_alpha": 0.0}
    data = data_with(**config)
    batches = batches_of(data)
    settings: dict[str, Any] = {"seed": 3, "accumulate": 1, "repeats": 2}
    whole = next(iter(TrainSampler(128, 32, rank=0, world=1, **settings)))
    parts = [next(iter(TrainSampler(128, 32, rank=rank, world=2, **settings))) for rank in range(2)]
    images = dict(zip(whole[1], batches[whole][0], strict=True))
    for part in parts:
        for number, image in zip(part[1], batches[part][0], strict=True):
            assert torch.equal(image, images[number])


def epochs_of(data: ImageData, epochs: range) -> list[Tensor]:
    data.first_epoch = epochs[0]
    loader = data.train_dataloader()
    found = []
    for epoch in epochs:
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for images, labels in loader:
            found += [images.clone(), labels.clone()]
    return found


def test_workers_and_restarts_change_nothing() -> None:
    whole = epochs_of(data_with(**ALL), range(2))
    torch.manual_seed(99)
    again = epochs_of(data_with(**ALL, workers=2), range(1, 2))
    assert len(whole) == 16
    assert whole[1].shape == (32, 10)
    assert all(torch.equal(a, b) for a, b in zip(whole[8:], again, strict=True))
    assert not torch.equal(whole[0], whole[8])
    assert torch.initial_seed() == 99


def test_a_run_with_everything_counts_hits_on_hard_labels(tmp_path: Path) -> None:
    settings = {f"data.{key}": value for key, value in {**ALL, "image_size": 12, "validation": 0.5}.items()}
    here = {"trainer.accelerator": "cpu", "trainer.devices": 1, "trainer.epochs": 1, "model.width": 0.08}
    recipe = recipe_of({**settings, **here, "model.calibrate": "all", "optim.label_smoothing": 0.1})
    summary = train(recipe, tmp_path / "run", quiet=True, monitor=2)
    assert (summary.status, summary.steps) == ("finished", 4)
    hits = summary.metrics["accuracy"] * 360
    assert hits == pytest.approx(round(hits), abs=1e-3)


WRONG = [
    ({"data.mixup_alpha": -1}, "data.mixup_alpha must be 0 .none., or from 0.001"),
    ({"data.cutmix_alpha": 1e-9}, "data.cutmix_alpha must be 0 .none., or from 0.001"),
    ({"data.random_erase": 1.5}, "data.random_erase must be from 0 to 1"),
    ({"data.ra_magnitude": 31}, "data.ra_magnitude must be from 0 to 30"),
    ({"data.ra_reps": 0}, "data.ra_reps must be at least 1"),
    ({"data.ra_reps": 2}, "data.ra_reps 2 repeats each image.*no augmentation"),
    ({"data.auto_augment": "augmix"}, "data.auto_augment"),
]
DETECT = [("auto_augment", "ra"), ("ra_magnitude", 5), ("random_erase", 0.1), ("mixup_alpha", 0.2)]
DETECT += [("cutmix_alpha", 1.0), ("ra_reps", 2)]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_wrong_values_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PwsError, match=message):
        recipe_of(settings)


@pytest.mark.parametrize(("name", "value"), DETECT)
def test_task_detect_has_none_of_them(name: str, value: Any) -> None:
    with pytest.raises(PwsError, match=f"data.{name} is a setting of task classify, and this recipe's task is detect"):
        Recipe(task="detect", data=DataConfig(name="scenes", augment=True, **{name: value}))


@pytest.mark.parametrize(("dtype", "channels"), [("float32", 3), ("uint8", 2)])
def test_auto_augment_needs_pictures(dtype: str, channels: int, tmp_path: Path) -> None:
    images, labels = np.ones((4, 8, 8, channels), dtype=dtype), np.arange(4) % 2
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    settings: dict[str, Any] = {"name": "npz", "root": str(tmp_path / "a.npz")}
    with pytest.raises(PwsError, match=f"images of bytes, in grey or colour; those of npz are {channels} channels"):
        data_with(**settings, auto_augment="ra")
    erased, _ = batches_of(data_with(**settings, random_erase=1.0))[0, [0, 1]]
    assert erased.shape == (2, channels, 8, 8)


def test_mixing_needs_two_images_at_a_time() -> None:
    with pytest.raises(PwsError, match="at least 2; got 1"):
        data_with(mixup_alpha=0.2, batch_size=1).train_dataloader()
