"""Batches: the same images in the same shape, however the work is divided."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from small_data import write_folder, write_npz
from torchvision import datasets as tv

from pws._errors import PwsError
from pws.training.data import ImageBatches, ImageData
from pws.training.datasets import load_splits
from pws.training.recipe import DataConfig
from pws.training.samplers import TestSampler, TrainSampler


def flat(sampler: TrainSampler) -> list[int]:
    return [number for _, numbers in sampler for number in numbers]


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_shares_make_up_the_whole_batch(world: int, accumulate: int) -> None:
    whole = list(TrainSampler(50, 8, seed=3, rank=0, world=1, accumulate=1))
    shares = [list(TrainSampler(50, 8, seed=3, rank=r, world=world, accumulate=accumulate)) for r in range(world)]
    for step, (_, batch) in enumerate(whole):
        parts = [part for share in shares for _, part in share[step * accumulate : (step + 1) * accumulate]]
        assert sorted(number for part in parts for number in part) == sorted(batch)
        assert {len(part) for part in parts} == {8 // (world * accumulate)}
    assert len(whole) == 50 // 8
    assert all(len(share) == len(whole) * accumulate for share in shares)


def test_order_changes_with_epoch_and_seed_and_repeats() -> None:
    sampler = TrainSampler(64, 8, seed=0, rank=0, world=1, accumulate=1)
    first = flat(sampler)
    assert sorted(first) == list(range(64))
    assert first == flat(TrainSampler(64, 8, seed=0, rank=0, world=1, accumulate=1))
    sampler.set_epoch(1)
    assert flat(sampler) != first
    assert flat(TrainSampler(64, 8, seed=1, rank=0, world=1, accumulate=1)) != first


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_test_image_once(world: int) -> None:
    numbers = [n for rank in range(world) for _, batch in TestSampler(23, 5, rank=rank, world=world) for n in batch]
    assert sorted(numbers) == list(range(23))


def test_augmentation_depends_on_seed_epoch_and_image_alone() -> None:
    config = DataConfig(name="digits", augment=True)
    splits = load_splits(config, seed=0)
    batches = ImageBatches(splits.train, splits, seed=0)
    together, _ = batches[2, [5, 6, 7, 8]]
    torch.manual_seed(99)
    alone, _ = batches[2, [7]]
    assert torch.equal(together[2], alone[0])
    other = torch.stack([batches[epoch, [7]][0][0] for epoch in range(8)])
    assert len(torch.unique(other, dim=0)) > 1
    assert torch.initial_seed() == 99, "drawing a batch must not reseed the process"


def test_workers_give_the_same_batches() -> None:
    loaders = [
        ImageData(DataConfig(name="digits", augment=True, train_images=64, batch_size=32, workers=workers), seed=4)
        for workers in (0, 2)
    ]
    for (a, la), (b, lb) in zip(*(data.train_dataloader() for data in loaders), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(la, lb)


@pytest.mark.parametrize("name", ["digits", pytest.param("fashion-mnist", marks=pytest.mark.needs("fashion-mnist"))])
def test_normalization_and_counts(name: str) -> None:
    splits = load_splits(DataConfig(name=name, validation=0), seed=0)
    assert (len(splits.train), len(splits.test)) == {"digits": (1437, 360), "fashion-mnist": (60000, 10000)}[name]
    pixels, labels = ImageBatches(splits.train, splits, 0)[0, list(range(len(splits.train)))]
    assert float(pixels.mean()) == pytest.approx(0, abs=2e-3)
    assert float(pixels.std()) == pytest.approx(1, abs=2e-3)
    assert labels.bincount().numel() == len(splits.classes) == 10


@pytest.mark.needs("fashion-mnist")
def test_fashion_mnist_labels_belong_to_images() -> None:
    # A trouser is narrow and a bag is wide: swapped or shifted labels would not keep that.
    splits = load_splits(DataConfig(name="fashion-mnist"), seed=0)
    pixels, labels = splits.test.get(list(range(2000)))
    width = (pixels.float().mean(2) > 20).sum(-1).squeeze(1).float()
    trouser, bag = (width[labels == splits.classes.index(name)].mean() for name in ("Trouser", "Bag"))
    assert bag > 1.5 * trouser


def test_resize_and_subset() -> None:
    splits = load_splits(DataConfig(name="digits", image_size=16, train_images=100), seed=0)
    pixels, _ = splits.train.get(list(range(100)))
    assert pixels.shape == (100, 1, 16, 16)
    other = load_splits(DataConfig(name="digits", image_size=16, train_images=100), seed=1)
    assert not torch.equal(other.train.get(list(range(100)))[0], pixels)


@pytest.mark.parametrize("kind", [tv.CIFAR10, tv.CIFAR100])
def test_cifar(kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    classes = 10 if kind is tv.CIFAR10 else 100
    names = [f"c{i}" for i in range(classes)]
    for file, _ in kind.train_list + kind.test_list:
        labels = list(range(classes))
        data = {"data": rng.integers(0, 256, (classes, 3072), dtype=np.uint8), "labels": labels, "fine_labels": labels}
        (folder / file).write_bytes(pickle.dumps(data))
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: names}))
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr(tv.cifar, "check_integrity", lambda *_: True)
    splits = load_splits(DataConfig(name=kind.__name__.lower(), root=str(tmp_path), augment=True), seed=0)
    assert splits.classes == names
    assert splits.train.get([3])[0].shape == (1, 3, 32, 32)
    raw = pickle.loads((folder / kind.test_list[0][0]).read_bytes())["data"][3].reshape(3, 32, 32)
    assert np.array_equal(splits.test.get([3])[0][0].numpy(), raw)


def test_folder(tmp_path: Path) -> None:
    write_folder(tmp_path, classes=2, images=3, side=40)
    for augment in (False, True):
        config = DataConfig(
            name="folder", root=str(tmp_path), image_size=32, augment=augment, batch_size=6, validation=0
        )
        data = ImageData(config, seed=0)
        pixels, labels = next(iter(data.train_dataloader()))
        assert pixels.shape == (6, 3, 32, 32)
        assert sorted(labels.tolist()) == [0, 0, 0, 1, 1, 1]
        assert data.splits.classes == ["class0", "class1"]


def test_npz(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", channels=3, count=20)
    splits = load_splits(DataConfig(name="npz", root=str(tmp_path / "a.npz"), validation=0), seed=0)
    pixels, labels = ImageBatches(splits.train, splits, 0)[0, list(range(20))]
    assert pixels.shape == (20, 3, 16, 16)
    assert pixels.mean((0, 2, 3)).abs().max() < 1e-5
    assert labels.tolist() == [*range(10), *range(10)]


def write_idx(folder: Path) -> None:
    """Two blank Fashion-MNIST images in each part, in four idx files."""
    for part in ("train", "t10k"):
        images = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 28, 0, 0, 0, 28]) + bytes(2 * 28 * 28)
        labels = bytes([0, 0, 8, 1, 0, 0, 0, 2, 3, 9])
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)


def test_idx_files_from_a_folder(tmp_path: Path) -> None:
    write_idx(tmp_path)
    splits = load_splits(DataConfig(name="fashion-mnist", root=str(tmp_path)), seed=0)
    assert splits.test.get([0, 1])[1].tolist() == [3, 9]
    assert splits.train.get([1])[0].shape == (1, 1, 28, 28)


@pytest.mark.parametrize("damage", ["missing", "cut off", "not gzip", "fewer labels"])
def test_damaged_fashion_mnist(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pws.training.datasets.DEBIAN_FASHION_MNIST", tmp_path / "nowhere")
    write_idx(tmp_path)
    labels = tmp_path / "t10k-labels-idx1-ubyte"
    whole = labels.read_bytes()
    labels.unlink()
    if damage == "cut off":
        labels.write_bytes(whole[:-1])
    elif damage == "not gzip":
        labels.with_suffix(".gz").write_bytes(b"<html>not found</html>")
    elif damage == "fewer labels":
        labels.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 1, 3]))
    with pytest.raises(PwsError, match="t10k"):
        load_splits(DataConfig(name="fashion-mnist", root=str(tmp_path)), seed=0)


def test_images_that_are_not_square(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 24, 60), dtype=np.uint8)
    labels = np.arange(20) % 2
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    for side, shape in ((None, (24, 60)), (24, (24, 24)), (60, (60, 60))):
        config = DataConfig(name="npz", root=str(tmp_path / "a.npz"), image_size=side, augment=True)
        splits = load_splits(config, seed=0)
        assert ImageBatches(splits.train, splits, 0)[0, [1, 2]][0].shape == (2, 1, *shape)
