"""Detection datasets: what is read from COCO's and VOC's files, and what is said of wrong ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detect_data import coco_content, voc_object, voc_xml, write_coco, write_voc
from PIL import Image
from torch import Tensor

from pws._errors import PwsError, UnknownNameError
from pws.training.detect.coco import CocoImages
from pws.training.detect.datasets import load_detection_splits
from pws.training.detect.voc import VocImages
from pws.training.images import read_image
from pws.training.recipe import DataConfig

PERSON = ["nose", "left_eye", "right_eye"]


def pixels_of(mask: Tensor) -> tuple[list[int], list[int]]:
    """The rows and the columns that a rectangular mask covers."""
    rows, columns = mask.nonzero(as_tuple=True)
    assert len(rows) == len(rows.unique()) * len(columns.unique())
    return rows.unique().tolist(), columns.unique().tolist()


def test_coco_objects(tmp_path: Path) -> None:
    images = CocoImages(*write_coco(tmp_path, coco_content()))
    assert (images.classes, images.has_masks, images.keypoint_names, len(images)) == (["dog", "cat"], True, [], 2)
    assert (images.size(0), images.size(1)) == ((8, 10), (6, 5))
    pixels, target = images.get(0)
    assert torch.equal(pixels, torch.arange(240, dtype=torch.uint8).view(8, 10, 3).permute(2, 0, 1))
    assert target["boxes"].tolist() == [[2, 1, 6, 5], [3, 2, 5, 5], [8.5, 6, 10, 8]]  # the last is clipped
    assert target["labels"].tolist() == [2, 1, 1]
    assert target["iscrowd"].tolist() == [0, 1, 0]
    assert target["area"].tolist() == [16.5, 6, 2]  # given, of the mask, of the mask
    masks = [pixels_of(mask) for mask in target["masks"]]
    assert masks == [([1, 2, 3, 4], [2, 3, 4, 5]), ([2, 3, 4], [3, 4]), ([6, 7], [9])]
    assert (target["masks"].dtype, target["boxes"].dtype) == (torch.uint8, torch.float32)


@pytest.mark.parametrize("masks", [True, False])
def test_a_coco_image_without_objects(masks: bool, tmp_path: Path) -> None:
    content = coco_content()
    for annotation in content["annotations"]:
        annotation["segmentation"] = annotation["segmentation"] if masks else []
    images = CocoImages(*write_coco(tmp_path, content))
    assert images.has_masks is masks
    pixels, target = images.get(1)
    assert pixels.shape == (3, 6, 5)
    assert {name: tuple(value.shape) for name, value in target.items()} == {
        **{"boxes": (0, 4), "labels": (0,), "iscrowd": (0,), "area": (0,)},
        **({"masks": (0, 6, 5)} if masks else {}),
    }


def test_coco_keypoints_and_their_pairs(tmp_path: Path) -> None:
    content = coco_content()
    content["categories"][1]["keypoints"] = PERSON
    content["annotations"][1]["keypoints"] = [3, 2, 2, 0, 0, 0, 4, 4, 1]
    images = CocoImages(*write_coco(tmp_path, content))
    assert images.keypoint_names == PERSON
    points = images.get(0)[1]["keypoints"]
    assert points[1].tolist() == [[3, 2, 2], [0, 0, 0], [4, 4, 1]]
    assert not points[[0, 2]].any()
    assert images.get(1)[1]["keypoints"].shape == (0, 3, 3)


def test_coco_leaves_out_what_the_file_itself_calls_empty(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"][0].update(bbox=[2, 1, 4, 0], area=0.0)  # as two of train2017's
    images = CocoImages(*write_coco(tmp_path, content))
    assert images.get(0)[1]["labels"].tolist() == [1, 1]


Change = Callable[[Any], Any]


def entry(key: str, number: int, **changes: Any) -> Change:
    def change(content: Any) -> Any:
        content[key][number].update(changes)
        return content

    return change


def annotation(number: int, **changes: Any) -> Change:
    return entry("annotations", number, **changes)


def rle(size: Any, counts: Any) -> Change:
    return annotation(1, segmentation={"size": size, "counts": counts})


OBJECTS: dict[str, tuple[str, str, Change]] = {
    "no such image": ("annotation 1", "image_id 9", annotation(0, image_id=9)),
    "an image of a list": ("annotation 1", "image_id [40]", annotation(0, image_id=[40])),
    "no such category": ("annotation 2", "category_id 8", annotation(1, category_id=8)),
    "no box": ("annotation 1", "4 finite numbers; got None", annotation(0, bbox=None)),
    "three numbers": ("annotation 1", "4 finite numbers; got [1, 2, 3]", annotation(0, bbox=[1, 2, 3])),
    "NaN": ("annotation 1", "4 finite numbers", annotation(0, bbox=[1, 2, 3, float("nan")])),
    "a word": ("annotation 1", "4 finite numbers", annotation(0, bbox=[1, 2, 3, "4"])),
    "huge": ("annotation 1", "4 finite numbers", annotation(0, bbox=[1, 2, 3, 10**400])),
    "no width": ("annotation 1", "without width or height", annotation(0, bbox=[1, 2, 0, 3])),
    "negative height": ("annotation 1", "without width or height", annotation(0, bbox=[1, 5, 2, -3])),
    "corners": ("annotation 1", "beyond its image of 10 x 8 pixels", annotation(0, bbox=[6, 1, 9, 5])),
    "outside": ("annotation 1", "outside of its image", annotation(0, bbox=[10, 1, 2, 2])),
    "crowd": ("annotation 1", "iscrowd 2", annotation(0, iscrowd=2)),
    "area": ("annotation 1", "area -1", annotation(0, area=-1)),
    "no segmentation": ("annotation 1", "no segmentation", annotation(0, segmentation=[])),
    "segmentation of a word": ("annotation 1", "'x'; it must be", annotation(0, segmentation="x")),
    "flat list": ("annotation 1", "polygon 2; it needs", annotation(0, segmentation=[2, 1, 6, 1, 6, 5])),
    "two points": ("annotation 1", "polygon [2, 1, 6, 1]", annotation(0, segmentation=[[2, 1, 6, 1]])),
    "odd": ("annotation 1", "three points or more", annotation(0, segmentation=[[2, 1, 6, 1, 6, 5, 2]])),
    "polygon of NaN": ("annotation 1", "all finite", annotation(0, segmentation=[[2, 1, 6, 1, 6, float("inf")]])),
    "polygon elsewhere": ("annotation 1", "by 90", annotation(0, segmentation=[[2, 1, 100, 1, 6, 5]])),
    "RLE of another size": ("annotation 2", "size [10, 8]", rle([10, 8], [26, 3, 51])),
    "RLE without counts": ("annotation 2", "malformed RLE", rle([8, 10], None)),
    "RLE too short": ("annotation 2", "malformed RLE", rle([8, 10], [26, 3])),
    "RLE too long": ("annotation 2", "malformed RLE", rle([8, 10], [26, 300])),
    "RLE of negative runs": ("annotation 2", "malformed RLE", rle([8, 10], [-1, 81])),
    "RLE of no runs": ("annotation 2", "malformed RLE", rle([8, 10], "PPP")),
    "RLE of nothing": ("annotation 2", "covers no pixel", rle([8, 10], [80])),
    "image without name": ("image 40", "needs a file_name", entry("images", 0, file_name=None)),
    "image without size": ("image 41 ('b.png')", "height and width", entry("images", 1, width="5")),
    "category without name": ("category 3", "name of its own", entry("categories", 1, name="")),
    "a name twice": ("category 7", "name of its own", entry("categories", 1, name="cat")),
    "keypoints of a number": ("category 7", "list of names", entry("categories", 0, keypoints=3)),
    "annotation without id": ("entry 0 of annotations", "with an id", annotation(0, id=None)),
    "annotation twice": ("id 1 occurs twice in annotations", "of its own", annotation(1, id=1)),
    "image twice": ("id 40 occurs twice in images", "of its own", entry("images", 1, id=40)),
    "category twice": ("id 7 occurs twice in categories", "of its own", entry("categories", 1, id=7)),
    "missing file": ("the first is c.png", "names 1 images", entry("images", 0, file_name="c.png")),
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_an_error_of_coco_names_file_and_object(kind: str, tmp_path: Path) -> None:
    thing, fault, change = OBJECTS[kind]
    annotations, images = write_coco(tmp_path, change(coco_content()))
    with pytest.raises(PwsError) as caught:
        CocoImages(annotations, images)
    assert str(annotations) in str(caught.value)
    assert thing in str(caught.value)
    assert fault in str(caught.value)


@pytest.mark.parametrize("points", [[1, 2], [0, 0, 0, 1, 1, 3, 0, 0, 0], "x", [float("nan")] * 9])
def test_wrong_keypoints(points: Any, tmp_path: Path) -> None:
    content = entry("categories", 0, keypoints=PERSON)(annotation(1, keypoints=points)(coco_content()))
    annotations, images = write_coco(tmp_path, content)
    with pytest.raises(PwsError, match=r"annotation 2 .*(finite numbers|visibilities)") as caught:
        CocoImages(annotations, images)
    assert str(annotations) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        *([], 3, None, {}, {"images": {}}, {**coco_content(), "annotations": 3}, {**coco_content(), "images": [5]}),
        *({**coco_content(), "categories": []}, {**coco_content(), "images": []}),
    ],
)
def test_another_json_is_not_coco(content: Any, tmp_path: Path) -> None:
    annotations, images = write_coco(tmp_path, content)
    with pytest.raises(PwsError) as caught:
        CocoImages(annotations, images)
    assert str(annotations) in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", None])
def test_what_is_no_json(text: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(PwsError, match="COCO's JSON") as caught:
        CocoImages(path, tmp_path)
    assert str(path) in str(caught.value)


def test_an_image_of_another_size_or_none_at_all(tmp_path: Path) -> None:
    annotations, images = write_coco(tmp_path, coco_content())
    Image.new("RGB", (8, 10)).save(images / "a.png")  # turned
    (images / "b.png").write_bytes((images / "b.png").read_bytes()[:40])
    loaded = CocoImages(annotations, images)
    with pytest.raises(PwsError, match=r"a\.png is 10 x 8 pixels there, and the file itself 8 x 10") as caught:
        loaded.get(0)
    assert str(annotations) in str(caught.value)
    with pytest.raises(PwsError, match=r"cannot read the image .*b\.png"):
        loaded.get(1)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(np.full((2, 3), 51_400, np.uint16)), (200, 200, 200)),
        (Image.new("L", (3, 2), 7), (7, 7, 7)),
        (Image.new("RGBA", (3, 2), (1, 2, 3, 0)), (1, 2, 3)),
        (Image.new("LA", (3, 2), (9, 0)), (9, 9, 9)),
        (Image.new("CMYK", (3, 2), (0, 0, 0, 255)), (0, 0, 0)),
        (Image.new("1", (3, 2), 1), (255, 255, 255)),
    ],
    ids=["16 bits", "grey", "alpha", "grey and alpha", "CMYK", "bits"],
)
def test_images_of_any_mode_become_colours(image: Image.Image, expected: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / ("a.tif" if image.mode == "CMYK" else "a.png")
    image.save(path)
    pixels = read_image(path)
    assert torch.equal(pixels, torch.tensor(expected, dtype=torch.uint8)[:, None, None].expand(3, 2, 3))


def test_voc_objects(tmp_path: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    objects = voc_object() + voc_object("person", (3.5, 1, 10, 8), "<difficult>1</difficult>" + part)
    write_voc(tmp_path / "VOC2007", {"000001": voc_xml(objects), "000002": voc_xml("")})
    write_voc(tmp_path / "VOC2012", {"2008_000001": voc_xml(voc_object("tvmonitor"))})
    images = VocImages([(tmp_path / "VOC2007", "trainval"), (tmp_path / "VOC2012", "trainval")])
    assert (len(images), images.size(1), len(images.classes)) == (3, (8, 10), 20)
    pixels, target = images.get(0)
    assert pixels.shape == (3, 8, 10)
    assert target["boxes"].tolist() == [[0, 1, 4, 5], [2.5, 0, 10, 8]]
    assert [images.classes[label - 1] for label in target["labels"]] == ["dog", "person"]
    assert target["difficult"].tolist() == [False, True]
    assert target["area"].tolist() == [16, 60]
    assert images.get(1)[1]["boxes"].shape == (0, 4)
    assert images.get(2)[1]["labels"].tolist() == [20]


LAUGHS = "".join(f'<!ENTITY {new} "{f"&{old};" * 99}">' for old, new in zip("abcde", "bcdef", strict=True))
VOC_FAULTS: dict[str, tuple[str, str]] = {
    "another class": (voc_xml(voc_object() + voc_object("zebra")), "object 2 ('zebra') is of none of VOC's classes"),
    "no box": (
        voc_xml("<object><name>dog</name></object>"),
        "object 1 ('dog') needs a finite number as its bndbox/xmin",
    ),
    "NaN": (voc_xml(voc_object(box=(1, 2, "nan", 3))), "bndbox/xmax; got 'nan'"),
    "words": (voc_xml(voc_object(box=(1, 2, "x", 3))), "bndbox/xmax; got 'x'"),
    "upside down": (voc_xml(voc_object(box=(1, 5, 4, 2))), "object 1 ('dog') has a box without width or height"),
    "beyond": (voc_xml(voc_object(box=(1, 2, 40, 5))), "object 1 ('dog') has a box beyond its image of 10 x 8"),
    "difficult": (voc_xml(voc_object(more="<difficult>x</difficult>")), "difficult 'x'"),
    "no size": ("<annotation></annotation>", "the image needs a finite number as its size/height"),
    "size 0": (voc_xml("", width=0), "the image needs its size"),
    "not XML": ("<annotation>", "cannot read"),
    "nothing": ("", "cannot read"),
    "entities": (
        f'<!DOCTYPE a [<!ENTITY a "aaaa">{LAUGHS}]><annotation>&f;</annotation>',
        "DOCTYPE",
    ),
}


@pytest.mark.parametrize("kind", VOC_FAULTS)
def test_an_error_of_voc_names_file_and_object(kind: str, tmp_path: Path) -> None:
    text, fault = VOC_FAULTS[kind]
    write_voc(tmp_path, {"000001": text})
    with pytest.raises(PwsError) as caught:
        VocImages([(tmp_path, "trainval")])
    assert str(tmp_path / "Annotations" / "000001.xml") in str(caught.value)
    assert fault in str(caught.value)


def test_an_entity_in_utf_16_is_refused_too(tmp_path: Path) -> None:
    write_voc(tmp_path, {"000001": ""})
    text = VOC_FAULTS["entities"][0]
    (tmp_path / "Annotations" / "000001.xml").write_bytes(text.encode("utf-16"))
    with pytest.raises(PwsError, match="DOCTYPE"):
        VocImages([(tmp_path, "trainval")])


@pytest.mark.parametrize("gone", ["ImageSets/Main/trainval.txt", "Annotations/000001.xml", "JPEGImages/000001.jpg"])
def test_a_missing_file_of_voc(gone: str, tmp_path: Path) -> None:
    write_voc(tmp_path, {"000001": voc_xml(voc_object())})
    (tmp_path / gone).unlink()
    with pytest.raises(PwsError) as caught:
        VocImages([(tmp_path, "trainval")])
    assert str(tmp_path / gone) in str(caught.value)


def test_a_voc_image_of_another_size(tmp_path: Path) -> None:
    write_voc(tmp_path, {"000001": voc_xml(voc_object(), width=20)})
    with pytest.raises(PwsError, match=r"000001\.jpg is 20 x 8 pixels there, and the file itself 10 x 8"):
        VocImages([(tmp_path, "trainval")]).get(0)


def test_coco_reads_its_file_once(tmp_path: Path) -> None:
    annotations, images = write_coco(tmp_path, coco_content())
    loaded = CocoImages(annotations, images)
    annotations.write_text(json.dumps([]))
    assert len(loaded.get(0)[1]["boxes"]) == 3


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
    splits = load_detection_splits(DataConfig(name=name, root=str(tmp_path)), seed=0)
    assert (len(splits.train), len(splits.test), splits.classes) == (2, 1, ["dog", "cat"])
    assert splits.train.name(0) == str(tmp_path / names[0] / "a.png")
    assert splits.test.name(0) == str(tmp_path / names[1] / "a.png")


def test_scenes_below_the_default_root(tmp_path: Path) -> None:
    both_coco(tmp_path / "scenes", ("train", "test"), "")
    assert len(load_detection_splits(DataConfig(name="scenes", root=str(tmp_path)), seed=0).train) == 2


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
        load_detection_splits(DataConfig(name=name, root=str(tmp_path)), seed=0)
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
    splits = load_detection_splits(DataConfig(name="voc", root=str(tmp_path)), seed=0)
    assert [Path(splits.train.name(number)).stem for number in range(len(splits.train))] == train
    assert [Path(splits.test.name(number)).stem for number in range(len(splits.test))] == ["000009"]
    assert (len(splits.classes), splits.train.has_masks) == (20, False)


def test_voc_2012_alone_is_tested_on_its_val(tmp_path: Path) -> None:
    write_voc(tmp_path / "VOC2012", {"2008_1": voc_xml(voc_object())}, "train")
    write_voc(tmp_path / "VOC2012", {"2008_2": voc_xml(""), "2008_3": voc_xml("")}, "val")
    splits = load_detection_splits(DataConfig(name="voc", root=str(tmp_path)), seed=0)
    assert (len(splits.train), len(splits.test)) == (1, 2)


def test_a_seeded_part_of_the_training_images() -> None:
    whole = load_detection_splits(DataConfig(name="digit-scenes"), seed=0)
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
    with pytest.raises(PwsError, match="must be 1 to 200"):
        load_detection_splits(DataConfig(name="digit-scenes", train_images=201), seed=0)
