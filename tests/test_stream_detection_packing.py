"""Detection in shards: what `pws pack` writes of COCO's files, also when it was interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from coco_folder import POINTS, content_of, write_parts
from detect_data import coco_content
from packed_objects import (
    PER_SHARD,
    assert_same,
    files_of,
    of,
    quiet,
    shards_of_three,
)

from pws._errors import PwsError
from pws.cli import main
from pws.training.pack import Progress, pack
from pws.training.stream import litdata


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("coco"), {"train": content_of(13), "test": content_of(4)})


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    pack(shards_of_three(folder), out, 1, quiet)
    return out


def test_files_keep_their_bytes(folder: Path, packed: Path) -> None:
    data = litdata().StreamingDataset(str(packed / "test"), batch_decode=0)
    for number in range(4):
        file, objects, name = data[number]
        assert bytes(file) == (folder / "test" / bytes(name).decode()).read_bytes()
        assert len(json.loads(bytes(objects))) == (0 if number == 3 else 3)


@pytest.mark.parametrize("name", ["coco", "coco-keypoints"])
def test_both_of_cocos_own_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = coco_content()
    with_points = {**content, "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog", "keypoints": POINTS}]}
    parts = ("train2017", "val2017")
    contents = {f"instances_{part}": content for part in parts}
    root = write_parts(tmp_path / "coco", {**contents, **{f"person_keypoints_{part}": with_points for part in parts}})
    flags = ["--keypoints"] if name == "coco-keypoints" else []
    assert main(["pack", str(root), str(tmp_path / "out"), "--jobs=1", *flags]) == 0
    assert "2 train, 2 test images in 2 shards" in " ".join(capsys.readouterr().out.split())
    found = of("stream", tmp_path / "out")
    assert found.train.keypoint_names == (POINTS if flags else [])
    assert_same(found, of(name, root))


def interrupted(shards: int) -> Progress:
    def progress(doing: str, done: int, total: int) -> None:
        if done == shards * PER_SHARD:
            raise KeyboardInterrupt

    return progress


def test_an_interrupted_packing_goes_on(folder: Path, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        pack(shards_of_three(folder), out, 1, interrupted(2))
    with pytest.raises(PwsError, match="not finished"):
        of("stream", out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.bin")}
    assert len(before) == 2
    said: list[tuple[str, int, int]] = []
    pack(shards_of_three(folder), out, 1, lambda *arguments: said.append(arguments))
    assert said[0] == ("packing", 6, 17)
    assert said[-1] == ("verifying", 7, 7)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert files_of(out) == files_of(packed)


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a box": lambda c: c["annotations"][0].update(bbox=[4, 2.25, 18, 17.5]),
    "a class's name": lambda c: c["categories"][0].update(name="cow"),
    "one object fewer": lambda c: c["annotations"].pop(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_it_does_not_go_on_with_other_objects(change: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    contents = {"train": content_of(4), "test": content_of(4)}
    root = write_parts(tmp_path / "coco", contents)
    with pytest.raises(KeyboardInterrupt):
        pack(shards_of_three(root), tmp_path / "out", 1, interrupted(1))
    for part, content in contents.items():
        change(content)
        (root / "annotations" / f"{part}.json").write_text(json.dumps(content))
    with pytest.raises(PwsError, match="an unfinished packing of other images"):
        pack(shards_of_three(root), tmp_path / "out", 1, quiet)
