"""Detection datasets: what is read from COCO's files, and what is said of wrong ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detect_data import coco_content, write_coco
from PIL import Image
from torch import Tensor

from pws._errors import PwsError
from pws.training.detect.coco import CocoImages
from pws.training.images import read_image

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


def test_coco_reads_its_file_once(tmp_path: Path) -> None:
    annotations, images = write_coco(tmp_path, coco_content())
    loaded = CocoImages(annotations, images)
    annotations.write_text(json.dumps([]))
    assert len(loaded.get(0)[1]["boxes"]) == 3
