"""Detection datasets by name: where they are looked for, and what is said of missing ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detect_data import coco_content, voc_object, voc_xml, write_coco, write_voc

from pws._errors import PwsError, UnknownNameError
from pws.training.detect.datasets import load_detection_splits
from pws.training.recipe import DataConfig

Change = Callable[[Any], Any]


def both_coco(root: Path, names: tuple[str, str], kind: str, test: Change = lambda content: content) -> None:
    root.mkdir(exist_ok=True)
    for name, change in zip(names, (lambda content: content, test), strict=True):
        annotations, _ = write_coco(root, change(coco_content()), name)
        annotations.rename(annotations.with_name(f"{kind}{name}.json"))


@pytest.mark.parametrize(
    ("name", "names", "kind"),
    [
        ("coco", ("train2017", "val2017"), "instances_"),
        ("coco", ("train", "test"), ""),
        ("coco-keypoints", ("train2017", "val2017"), "person_keypoints_"),
        ("scenes", ("train", "test"), ""),
    ],
)
def test_where_coco_is_looked_for(name: str, names: tuple[str, str], kind: str, tmp_path: Path) -> None:
    both_coco(tmp_path, names, kind, test=lambda content: {**content, "images": content["images"][:1]})
    splits = load_detection_splits(DataConfig(name=name, root=str(tmp_path), validation=0), seed=0)
    assert (len(splits.train), len(splits.test), splits.classes) == (2, 1, ["dog", "cat"])
    assert splits.train.name(0) == str(tmp_path / names[0] / "a.png")
    assert splits.test.name(0) == str(tmp_path / names[1] / "a.png")


def test_scenes_below_the_default_root(tmp_path: Path) -> None:
    both_coco(tmp_path / "scenes", ("train", "test"), "")
    assert len(load_detection_splits(DataConfig(name="scenes", root=str(tmp_path), validation=0), seed=0).train) == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("coco", "instances_train2017.json and instances_val2017.json or train.json and test.json"),
        ("coco-keypoints", "person_keypoints_train2017.json"),
        ("scenes", "pws scenes ROOT/scenes"),
        ("voc", "ROOT holds neither VOC2007 nor VOC2012"),
    ],
)
def test_missing_files_and_how_to_get_them(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(PwsError) as caught:
        load_detection_splits(DataConfig(name=name, root=str(tmp_path), validation=0), seed=0)
    assert said.replace("ROOT", str(tmp_path)) in str(caught.value)


def test_an_unknown_dataset() -> None:
    with pytest.raises(UnknownNameError, match="coco-keypoints"):
        load_detection_splits(DataConfig(name="coco-keypoint"), seed=0)


@pytest.mark.parametrize(("names", "odd"), [(["cat", "cow"], r"\['cow', 'dog'\]"), (["dog", "cat"], "their order")])
def test_both_parts_have_the_same_classes(names: list[str], odd: str, tmp_path: Path) -> None:
    categories = [{"id": key, "name": name} for key, name in zip((7, 3), names, strict=True)]
    both_coco(tmp_path, ("train", "test"), "", test=lambda content: {**content, "categories": categories})
    with pytest.raises(PwsError, match=f"the same classes; in one only: .*{odd}"):
        load_detection_splits(DataConfig(name="coco", root=str(tmp_path)), seed=0)


@pytest.mark.parametrize("below", ["", "VOCdevkit"])
@pytest.mark.parametrize(("years", "train"), [((2007,), ["000001"]), ((2007, 2012), ["000001", "2008_1"])])
def test_voc_is_tested_on_2007(years: tuple[int, ...], train: list[str], below: str, tmp_path: Path) -> None:
    for year in years:
        name = {2007: "000001", 2012: "2008_1"}[year]
        write_voc(tmp_path / below / f"VOC{year}", {name: voc_xml(voc_object())})
    write_voc(tmp_path / below / "VOC2007", {"000009": voc_xml("")}, "test")
    splits = load_detection_splits(DataConfig(name="voc", root=str(tmp_path), validation=0), seed=0)
    assert [Path(splits.train.name(number)).stem for number in range(len(splits.train))] == train
    assert [Path(splits.test.name(number)).stem for number in range(len(splits.test))] == ["000009"]
    assert (len(splits.classes), splits.train.has_masks) == (20, False)


def test_voc_2012_alone_is_tested_on_its_val(tmp_path: Path) -> None:
    write_voc(tmp_path / "VOC2012", {"2008_1": voc_xml(voc_object())}, "train")
    write_voc(tmp_path / "VOC2012", {"2008_2": voc_xml(""), "2008_3": voc_xml("")}, "val")
    splits = load_detection_splits(DataConfig(name="voc", root=str(tmp_path), validation=0), seed=0)
    assert (len(splits.train), len(splits.test)) == (1, 2)


def test_a_seeded_part_of_the_training_images() -> None:
    whole = load_detection_splits(DataConfig(name="digit-scenes", validation=0), seed=0)
    some, other = (
        load_detection_splits(DataConfig(name="digit-scenes", train_images=20), seed=seed) for seed in (0, 1)
    )
    assert (len(whole.train), len(whole.test), len(some.train), len(some.test)) == (200, 50, 20, 50)
    names = [[splits.train.name(number) for number in range(20)] for splits in (some, other)]
    assert names[0] != names[1]
    assert len(set(names[0])) == 20
    number = int(Path(names[0][3]).stem)
    assert torch.equal(some.train.get(3)[0], whole.train.get(number)[0])
    assert (some.train.has_masks, len(some.train.keypoint_names)) == (True, 4)
    assert some.train.size(3) == (96, 96)
    with pytest.raises(PwsError, match="has 200 training images"):
        load_detection_splits(DataConfig(name="digit-scenes", train_images=201), seed=0)
