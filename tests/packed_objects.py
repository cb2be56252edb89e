"""COCO's files in shards of three images, and comparisons of the samples read from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pws.training.detect.coco import CocoImages
from pws.training.detect.datasets import load_detection_splits
from pws.training.detect.pack_source import coco_source
from pws.training.detect.samples import DetectionSplits
from pws.training.pack_sources import Source
from pws.training.recipe import DataConfig

PER_SHARD = 3


def shards_of_three(root: Path, *, keypoints: bool = False) -> Source:
    source = coco_source(root, keypoints=keypoints)
    small = replace(source, bytes=source.images * 2**26 // PER_SHARD)
    assert small.shard_images() == PER_SHARD
    return small


def quiet(*_: object) -> None: ...


def of(name: str, root: Path | str, **settings: Any) -> DetectionSplits:
    return load_detection_splits(DataConfig(name=name, root=str(root), **{"validation": 0, **settings}), seed=0)


def numbers_by_name(images: Any) -> dict[str, int]:
    if isinstance(images, CocoImages):
        return {image.name: number for number, image in enumerate(images.images)}
    return {images.name(number): number for number in range(len(images))}


def assert_same_sample(found: tuple[Tensor, Any], expected: tuple[Tensor, Any]) -> None:
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for key, value in expected[1].items():
        assert (type(found[1][key]), found[1][key].dtype) == (type(value), value.dtype)
        assert torch.equal(found[1][key], value), key
    assert found[1]["boxes"].canvas_size == expected[1]["boxes"].canvas_size


def assert_same(found: DetectionSplits, expected: DetectionSplits) -> None:
    assert found.classes == expected.classes
    for images, others in ((found.train, expected.train), (found.test, expected.test)):
        assert len(images) == len(others)
        assert (images.has_masks, images.keypoint_names) == (others.has_masks, others.keypoint_names)
        assert_samples(images, others)


def assert_samples(images: Any, others: Any) -> None:
    """Each of the images is one of the others, by its name."""
    numbers = numbers_by_name(others)
    for name, number in numbers_by_name(images).items():
        assert images.size(number) == others.size(numbers[name])
        assert_same_sample(images.get(number), others.get(numbers[name]))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
