"""Training, validation and test images: which are which, and when each is looked at."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_data import write_folder, write_npz
from torch import Tensor

from pws._errors import PwsError
from pws.training import evaluate, load_recipe, train
from pws.training.datasets import load_splits
from pws.training.detect.datasets import load_detection_splits
from pws.training.images import Images, TensorImages
from pws.training.recipe import DataConfig

TINY = (
    *("--data.name=digits", "--data.image_size=12", "--data.train_images=128", "--data.batch_size=32"),
    *("--model.width=0.08", "--trainer.accelerator=cpu", "--trainer.devices=1", "--optim.schedule=constant"),
)
RECIPE = "fashion-mnist-allconv-pws"


def pixels_of(images: Images | None) -> set[bytes]:
    assert images is not None
    return {images.get([number])[0].numpy().tobytes() for number in range(len(images))}


def test_validation_images_are_a_seeded_part_of_the_training_images() -> None:
    whole = load_splits(DataConfig(name="digits", validation=0), seed=0)
    splits, again, other = (
        load_splits(DataConfig(name="digits", augment=True, validation=0.2), seed=seed) for seed in (0, 0, 1)
    )
    assert whole.validation is None
    assert splits.validation is not None
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (1150, 287, 360)
    held_out, trained = pixels_of(splits.validation), pixels_of(splits.train)
    assert not held_out & trained
    assert held_out | trained == pixels_of(whole.train)
    assert pixels_of(again.validation) == held_out != pixels_of(other.validation)
    assert splits.train.augment is not None
    assert splits.validation.augment is None


def test_a_part_of_the_training_images_has_its_share_beside_it() -> None:
    config = DataConfig(name="digits", train_images=100, validation=0.1)
    splits, without = (
        load_splits(config, seed=3),
        load_splits(DataConfig(name="digits", train_images=100, validation=0), 3),
    )
    assert splits.validation is not None
    assert (len(splits.train), len(splits.validation)) == (100, 10)
    assert torch.equal(splits.train.get(list(range(100)))[0], without.train.get(list(range(100)))[0])
    assert not pixels_of(splits.train) & pixels_of(splits.validation)


@pytest.mark.parametrize(("wanted", "share", "held_out"), [(1437, 0.1, 144), (1400, 0.1, 140), (1438, 0.0, 0)])
def test_too_few_images_for_both(wanted: int, share: float, held_out: int) -> None:
    config = DataConfig(name="digits", train_images=wanted, validation=share)
    with pytest.raises(
        PwsError, match=f"has 1,437 training images.*train_images {wanted:,} and, beside them, {held_out} "
    ):
        load_splits(config, seed=0)


def test_a_folder_for_validation_or_none(tmp_path: Path) -> None:
    write_folder(tmp_path, classes=2, images=5, side=40)
    config = DataConfig(name="folder", root=str(tmp_path), image_size=32, validation=0.2, augment=True)
    drawn = load_splits(config, seed=0)
    assert drawn.validation is not None
    assert (len(drawn.train), len(drawn.validation), len(drawn.test)) == (8, 2, 10)
    names = {part.name(n) for part in (drawn.train, drawn.validation) for n in range(len(part))}
    assert len(names) == 10
    assert drawn.validation.get([0])[0].shape == (1, 3, 32, 32)
    shutil.copytree(tmp_path / "val", tmp_path / "test")
    (tmp_path / "test" / "class1" / "4.png").unlink()
    own = load_splits(config, seed=0)
    assert own.validation is not None
    assert (len(own.train), len(own.validation), len(own.test)) == (10, 10, 9)
    assert load_splits(DataConfig(name="folder", root=str(tmp_path), validation=0), seed=0).validation is None
    shutil.rmtree(tmp_path / "test" / "class1")
    with pytest.raises(PwsError, match=r"train and test must hold the same class folders.*class1"):
        load_splits(config, seed=0)


def test_medmnist_brings_validation_images(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_npz(path, count=20)
    with np.load(path) as file:
        arrays: dict[str, Any] = dict(file)
    own = np.full((7, 16, 16), 9, np.uint8)
    np.savez(path, **arrays, val_images=own, val_labels=np.arange(7)[:, None])
    splits = load_splits(DataConfig(name="npz", root=str(path)), seed=0)
    assert splits.validation is not None
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (20, 7, 20)
    assert pixels_of(splits.validation) == {own[0].tobytes()}
    np.savez(path, **arrays, val_images=own, val_labels=np.arange(7) + 5)  # a class that the other parts lack
    assert len(load_splits(DataConfig(name="npz", root=str(path)), seed=0).classes) == 12
    np.savez(path, **arrays, val_images=own[:, :8], val_labels=np.arange(7))
    with pytest.raises(PwsError, match=r"one shape; got \(1, 16, 16\) for training and \(1, 8, 16\) for validation"):
        load_splits(DataConfig(name="npz", root=str(path)), seed=0)


def test_scenes_are_divided_too() -> None:
    splits = load_detection_splits(DataConfig(name="digit-scenes"), seed=0)
    assert splits.validation is not None
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (180, 20, 50)
    names = [{part.name(n) for n in range(len(part))} for part in (splits.train, splits.validation)]
    assert len(names[0] | names[1]) == 200


def test_test_images_are_read_at_the_end_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    original = TensorImages.get

    def get(self: TensorImages, numbers: list[int]) -> tuple[Tensor, Tensor]:
        read.append((len(self), len(numbers)))
        return original(self, numbers)

    monkeypatch.setattr(TensorImages, "get", get)
    train(load_recipe(RECIPE, *TINY, "--trainer.epochs=2"), tmp_path / "run", quiet=True)
    # One for its shape, before the network is built, and for data.json.
    assert [read.pop(0) for _ in range(2)] == [(360, 1)] * 2
    first = next(place for place, (images, _) in enumerate(read) if images == 360)
    assert {images for images, _ in read[:first]} == {128, 13}
    assert sum(count for images, count in read[first:] if images == 360) == 360
    assert {images for images, _ in read[first:]} == {360}


def test_the_best_epoch_by_validation_is_tested(tmp_path: Path) -> None:
    # The rate is so large that the last epoch is not the best.
    recipe = load_recipe(RECIPE, *TINY, "--trainer.epochs=6", "--optim.lr=0.5", "--seed=1")
    summary = train(recipe, tmp_path / "run", quiet=True)
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    validated = [float(row["val_accuracy"]) for row in rows if row["val_accuracy"]]
    assert summary.best == pytest.approx(max(validated))
    best, last = evaluate(tmp_path / "run"), evaluate(tmp_path / "run", "last")
    assert summary.metrics == {key: pytest.approx(getattr(best, key)) for key in ("accuracy", "top5", "loss")}
    assert best.loss != last.loss, "choose a seed whose last epoch is not the best"
    epoch = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)["epoch"]
    assert epoch == validated.index(max(validated))


def test_without_validation_images_the_last_epoch_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(RECIPE, *TINY, "--trainer.epochs=2", "--data.validation=0")
    summary = train(recipe, tmp_path / "run")
    assert (summary.best, summary.checkpoint) == (None, "last")
    assert summary.metrics["accuracy"] == pytest.approx(evaluate(tmp_path / "run", "last").accuracy)  # type: ignore[union-attr]
    assert not (tmp_path / "run" / "checkpoints" / "best.ckpt").exists()
    assert "validation loss" not in capsys.readouterr().out
    with pytest.raises(PwsError, match="early_stop waits for a better result"):
        load_recipe(RECIPE, *TINY, "--data.validation=0", "--trainer.early_stop=2")


def test_an_end_within_an_epoch_is_validated_and_can_be_the_best(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, *TINY, "--trainer.epochs=9", "--trainer.max_steps=26")  # six epochs of four, and two
    summary = train(recipe, tmp_path / "run", quiet=True)
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    validated = [(int(row["step"]), float(row["val_accuracy"])) for row in rows if row["val_accuracy"]]
    assert len(validated) == 7
    assert summary.best == pytest.approx(max(accuracy for _, accuracy in validated))
    assert summary.metrics["loss"] == pytest.approx(evaluate(tmp_path / "run").loss)  # type: ignore[union-attr]
