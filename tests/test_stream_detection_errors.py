"""Detection in shards: wrong folders, damaged lists and damaged shards are told in a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from coco_folder import content_of, write_parts
from packed_objects import (
    files_of,
    of,
    quiet,
    shards_of_three,
)
from PIL import Image
from small_data import write_folder

from pws._errors import PwsError
from pws.cli import main
from pws.training.data import ImageData
from pws.training.detect.pack_source import coco_source
from pws.training.pack import pack
from pws.training.pack_sources import source_of
from pws.training.recipe import DataConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("coco"), {"train": content_of(13), "test": content_of(4)})


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    pack(shards_of_three(folder), out, 1, quiet)
    return out


def test_each_task_has_packs_of_its_own(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits = tmp_path / "digits"
    pack(source_of("digits", "", None, download=False), digits, 1, quiet)
    for recipe, root, of_pack, wanted in (
        ("scenes-faster-rcnn", digits, "classify", "detect"),
        ("fashion-mnist-allconv-pws", packed, "detect", "classify"),
    ):
        flags = ("--data.name=stream", f"--data.root={root}", f"--runs={tmp_path / 'runs'}")
        assert main(["train", recipe, *flags]) == 2
        error = capsys.readouterr().err
        told = f"{root} holds images that were packed for task {of_pack}, and this recipe's task is {wanted}."
        assert error.startswith(f"pws: {told}")
        assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()
    with pytest.raises(PwsError, match="packed for task detect"):
        ImageData(DataConfig(name="stream", root=f"local:{packed}"), seed=0)


WRONG: dict[str, tuple[Sequence[str], str]] = {
    "size": (["coco", "out", "--size=32"], "--size is for images of classes"),
    "keypoints of classes": (["photos", "out", "--keypoints"], "--keypoints is for a folder of COCO"),
    "keypoints of no images": (["digits", "out", "--keypoints"], "--keypoints is for a folder of COCO"),
    "an image is missing": (["lost", "out"], "names 1 images that are not in lost/train"),
    "one part": (["half", "out"], "half/annotations must hold instances_train2017.json and"),
}


@pytest.mark.parametrize(("arguments", "told"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_told_in_a_line(
    arguments: Sequence[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("coco", "lost", "half"):
        write_parts(tmp_path / name, {"train": content_of(1), "test": content_of(1)})
    write_folder(tmp_path / "photos", classes=2, images=1, side=8)
    (tmp_path / "lost" / "train" / "0.png").unlink()
    (tmp_path / "half" / "annotations" / "test.json").unlink()
    assert main(["pack", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pws: ")
    assert told in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def own_copy(packed: Path, out: Path) -> Path:
    for name, content in files_of(packed).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    return out


DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no task": lambda c: c.pop("task"),
    "an unknown task": lambda c: c.update(task="segment"),
    "the other task": lambda c: c.update(task="classify"),
    "no sizes": lambda c: c.pop("sizes"),
    "a size is missing": lambda c: c["sizes"]["train"].pop(),
    "sizes of a part are missing": lambda c: c["sizes"].pop("test"),
    "a size of three": lambda c: c["sizes"]["train"][0].append(3),
    "a size of words": lambda c: c["sizes"]["train"].__setitem__(0, ["a", "b"]),
    "an empty image": lambda c: c["sizes"]["train"].__setitem__(0, [0, 5]),
    "masks of one part": lambda c: c["about"]["masks"].pop("test"),
    "keypoints of another part": lambda c: c["about"]["keypoints"].update(val=[]),
}


@pytest.mark.parametrize("change", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_index_is_refused_at_the_start(
    change: Callable[[dict[str, Any]], object], packed: Path, tmp_path: Path
) -> None:
    index = own_copy(packed, tmp_path) / "pws.json"
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))
    with pytest.raises(PwsError) as raised:
        of("stream", tmp_path)
    assert str(raised.value).startswith(str(index))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (b'"label"', b'"lab l"', "the objects of 0.png are damaged"),
        (b'[{"label', b'[}"label', "the objects of 0.png are damaged"),
        (b"\x89PNG", b"\x89ONG", "cannot read the image 0.png"),
    ],
)
def test_a_damaged_shard_is_told_by_its_image(old: bytes, new: bytes, told: str, packed: Path, tmp_path: Path) -> None:
    shard = own_copy(packed, tmp_path) / "test" / "chunk-0-0.bin"
    content = shard.read_bytes()
    assert old in content
    shard.write_bytes(content.replace(old, new, 1))
    with pytest.raises(PwsError, match=told):
        of("stream", tmp_path).test.get(0)


def test_an_image_of_another_size_than_its_objects(tmp_path: Path) -> None:
    root = write_parts(tmp_path / "coco", {"train": content_of(4), "test": content_of(4)})
    Image.new("RGB", (8, 9)).save(root / "test" / "2.png")
    pack(coco_source(root, keypoints=False), tmp_path / "out", 1, quiet)
    with pytest.raises(PwsError, match=r"2\.png is 50 x 50 pixels there, and the file itself 8 x 9"):
        of("stream", tmp_path / "out").test.get(2)
