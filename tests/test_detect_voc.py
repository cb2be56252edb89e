"""VOC's files: what is read from them, and what is said of wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from detect_data import voc_object, voc_xml, write_voc

from pws._errors import PwsError
from pws.training.detect.voc import VocImages


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
