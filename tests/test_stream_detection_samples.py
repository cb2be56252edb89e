"""`data.name: stream` with task detect: the samples, batches and losses are those of the folder that was packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from coco_folder import POINTS, SHAPES, content_of, write_parts
from packed_objects import (
    PER_SHARD,
    assert_same,
    assert_samples,
    numbers_by_name,
    of,
    quiet,
    shards_of_three,
)
from small_detectors import FEW
from torch import Tensor, nn

from pws.training.detect.data import DetectionData
from pws.training.detect.pack_source import coco_source
from pws.training.detect.stream import StreamObjects
from pws.training.detect.write_scenes import SceneSettings, write_scenes
from pws.training.pack import pack
from pws.training.recipe import DataConfig
from pws.training.recipe_file import recipe_of
from pws.training.samplers import TrainSampler
from pws.training.tasks import data_of, module_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("coco"), {"train": content_of(13), "test": content_of(4)})


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    pack(shards_of_three(folder), out, 1, quiet)
    return out


def test_samples_are_those_of_the_folder(folder: Path, packed: Path) -> None:
    expected, found = of("coco", folder), of("stream", packed)
    assert_same(found, expected)
    assert (found.train.has_masks, found.train.keypoint_names) == (True, POINTS)
    targets = [found.train.get(number)[1] for number in range(13)]
    assert sorted(len(target["boxes"]) for target in targets) == [0] * 3 + [3] * 10
    assert {int(target["iscrowd"].sum()) for target in targets} == {0, 1}
    assert list(numbers_by_name(found.test)) == list(numbers_by_name(expected.test))
    assert list(numbers_by_name(found.train)) != list(numbers_by_name(expected.train)), "in an order drawn once"


@pytest.mark.parametrize("masks", ["both", "train", "none"])
def test_masks_are_those_of_each_part(masks: str, tmp_path: Path) -> None:
    contents = {"train": content_of(4), "test": content_of(4)}
    for part in {"both": [], "train": ["test"], "none": ["train", "test"]}[masks]:
        for record in contents[part]["annotations"]:
            record["segmentation"] = []
    root = write_parts(tmp_path / "coco", contents)
    pack(coco_source(root, keypoints=False), tmp_path / "out", 1, quiet)
    found = of("stream", tmp_path / "out")
    assert (found.train.has_masks, found.test.has_masks) == (masks != "none", masks == "both")
    assert_same(found, of("coco", root))


def test_scenes(tmp_path: Path) -> None:
    (tmp_path / "scenes").mkdir()
    write_scenes(tmp_path / "scenes", SceneSettings("digits", train=4, test=2, size=48), 1, quiet)
    pack(coco_source(tmp_path / "scenes", keypoints=False), tmp_path / "out", 1, quiet)
    found = of("stream", tmp_path / "out")
    assert len(found.train.keypoint_names) == 4
    assert_same(found, of("scenes", tmp_path))


def test_a_training_step_has_the_losses_of_the_folder(folder: Path, packed: Path) -> None:
    batches = {}
    for name, root in (("coco", folder), ("stream", packed)):
        recipe = recipe_of(
            {
                **{"task": "detect", "model.name": "faster-rcnn-resnet18", "model.width": 0.05, "model.options": FEW},
                **{"model.anchor_size": 16, "data.name": name, "data.root": str(root), "data.image_size": 64},
                **{"data.validation": 0, "data.batch_size": 3},
            }
        )
        data = data_of(recipe)
        numbers = numbers_by_name(data.splits.train)
        wanted = [numbers[file] for file in ("5.jpg", "3.jpg", "10.png")]
        batches[name] = data.batches(data.splits.train, train=True)[0, wanted]
    # One network for both: its gains are measured on the first images, and those are others in a shard.
    module = module_of(recipe, data)
    found = {name: losses_of(module.model, *batch) for name, batch in batches.items()}
    assert len(found["coco"]) == 5
    assert all(value > 0 for value in found["coco"].values())
    assert found["stream"] == found["coco"]


def losses_of(model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, float]:
    """The losses of a step, and the sum of the gradients' sizes."""
    torch.manual_seed(0)
    losses = model.train()(images, targets)
    gradients = torch.autograd.grad(sum(losses.values()), [p for p in model.parameters() if p.requires_grad])
    return {name: loss.item() for name, loss in losses.items()} | {
        "gradients": sum(g.abs().sum().item() for g in gradients)
    }


def test_batches_hold_one_shape_and_go_through_the_shards(
    folder: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pws.training.stream.WINDOW", 1)
    monkeypatch.setenv("LITDATA_CACHE_DIR", str(tmp_path))
    data = DetectionData(DataConfig(name="stream", root=f"local:{packed}", batch_size=2, validation=0), seed=0)
    train, sampler = data.splits.train, data.train_dataloader().sampler
    assert isinstance(train, StreamObjects)
    assert isinstance(sampler, TrainSampler)
    assert sampler.order == train.order
    order = (train.order(torch.Generator().manual_seed(0)) // PER_SHARD).tolist()
    assert order != sorted(order)
    assert len([n for n in range(1, 13) if order[n] != order[n - 1]]) == 4, "one shard after the other"
    groups = data.groups()
    assert groups is not None
    batches = [numbers for _, numbers in sampler]
    assert not list(tmp_path.rglob("*.bin")), "no image is read for it"
    assert len({number for numbers in batches for number in numbers}) == 12
    assert all(len({groups[number] for number in numbers}) == 1 for numbers in batches[:5])
    sizes = {name: SHAPES[int(Path(name).stem) % 4] for name in numbers_by_name(train)}
    assert groups == [int(height > width) for height, width in sizes.values()]


def test_held_out_images_and_an_order_of_those_left(folder: Path, packed: Path) -> None:
    data = DetectionData(DataConfig(name="stream", root=str(packed), validation=0.25, batch_size=2), seed=0)
    train, validation = data.splits.train, data.splits.validation
    assert isinstance(train, StreamObjects)
    assert validation is not None
    names = set(numbers_by_name(train)), set(numbers_by_name(validation))
    assert [len(found) for found in names] == [10, 3]
    assert not names[0] & names[1]
    assert sorted(train.order(torch.Generator()).tolist()) == list(range(10))
    for images in (train, validation):
        assert_samples(images, of("coco", folder).train)


@pytest.mark.parametrize("augment", ["flip", "jitter"])
def test_loader_processes_and_a_url_give_the_same_batches(
    augment: Any, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITDATA_CACHE_DIR", str(tmp_path))
    plain = {"name": "stream", "augment": augment, "batch_size": 3, "validation": 0}
    here = DetectionData(DataConfig(root=str(packed), **plain), 4)
    there = DetectionData(DataConfig(root=f"local:{packed}", workers=2, **plain), 4)
    for (images, targets), (others, theirs) in zip(here.train_dataloader(), there.train_dataloader(), strict=True):
        assert all(map(torch.equal, images, others))
        for target, other in zip(targets, theirs, strict=True):
            assert all(torch.equal(target[key], other[key]) for key in target)
