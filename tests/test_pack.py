"""`pws pack`: what is stored, whatever interrupts it, and what is refused."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_data import write_folder

from pws._errors import PwsError
from pws.cli import main
from pws.training.pack import pack
from pws.training.pack_sources import ArrayEntry, Entry, Source, folder_source, source_of
from pws.training.shards import parse_index, shard_of
from pws.training.stream import litdata


def quiet(*_: object) -> None: ...


def digits() -> Source:
    return source_of("digits", "", None, download=False)


def stored(part: Path) -> list[tuple[bytes, int, str]]:
    """What litdata's own reader gives."""
    data = litdata().StreamingDataset(str(part), batch_decode=0)
    return [(bytes(file), label, bytes(name).decode()) for file, label, name in (data[n] for n in range(len(data)))]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_folder(tmp_path / "photos", classes=2, images=3, side=40)
    rng = np.random.default_rng(1)
    for part in ("train", "val"):
        Image.fromarray(rng.integers(0, 256, (90, 60, 3), np.uint8)).save(tmp_path / f"photos/{part}/class1/9.jpg")
    return tmp_path / "photos"


def test_files_keep_their_bytes_labels_and_names(photos: Path, tmp_path: Path) -> None:
    index = pack(folder_source(photos, None), tmp_path / "out", 1, quiet)
    assert index.about.classes == ["class0", "class1"]
    for part in ("train", "val"):
        found = stored(tmp_path / "out" / part)
        expected = [
            (path.read_bytes(), int(path.parent.name == "class1"), f"{path.parent.name}/{path.name}")
            for path in sorted((photos / part).rglob("*.*g"))
        ]
        assert len(expected) == 7
        assert sorted(found, key=lambda image: image[2]) == expected
        assert (found == expected) == (part == "val")


def test_size_shortens_the_shorter_side_of_larger_images(photos: Path, tmp_path: Path) -> None:
    pack(folder_source(photos, 41), tmp_path / "out", 1, quiet)
    for file, _, name in stored(tmp_path / "out" / "val"):
        before = photos / "val" / name
        with Image.open(BytesIO(file)) as image, Image.open(before) as original:
            assert image.format == original.format
            if min(original.size) <= 41:
                assert file == before.read_bytes()
            else:
                assert (name, image.size) == ("class1/9.jpg", (41, 61))


def test_shards_hold_so_many_images_or_bytes() -> None:
    source = digits()
    assert source.shard_images() == 1000
    assert replace(source, bytes=source.images * 2**20).shard_images() == 64
    assert replace(source, bytes=source.images * 2**30).shard_images() == 1


def test_a_shard_may_hold_one_image(tmp_path: Path) -> None:
    source = digits()
    few = replace(source, parts={part: entries[:3] for part, entries in source.parts.items()}, bytes=2**40)
    index = pack(few, tmp_path / "out", 1, quiet)
    assert [shard.images for _, shard in index.shards()] == [1] * 6
    assert [name for *_, name in stored(tmp_path / "out" / "test")] == ["test/0", "test/1", "test/2"]


@dataclass(frozen=True)
class Deadly(ArrayEntry):
    """Ends the process without a word, as kill -9 does."""

    def data(self) -> bytes:
        os._exit(9)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_killed_packing_goes_on(tmp_path: Path) -> None:
    source, out = digits(), tmp_path / "out"
    train: list[Entry] = list(source.parts["train"])
    last = train[1200]
    assert isinstance(last, ArrayEntry)
    train[1200] = Deadly(last.pixels, last.label, last.name)
    child = os.fork()
    if not child:
        pack(replace(source, parts={**source.parts, "train": train}), out, 1, quiet)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert [path.name for path in out.rglob("*.bin")] == ["chunk-0-0.bin"]
    assert [path for path in (out / ".packing").rglob("*") if path.parent.name == "train" and path.is_dir()]
    before = (out / "train" / "chunk-0-0.bin").stat().st_mtime_ns
    said: list[tuple[str, int, int]] = []
    pack(source, out, 1, lambda *arguments: said.append(arguments))
    assert said[0] == ("packing", 1000, 1797)
    assert said[-1] == ("verifying", 3, 3)
    assert (out / "train" / "chunk-0-0.bin").stat().st_mtime_ns == before
    pack(source, tmp_path / "whole", 1, quiet)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_a_shard_that_is_not_what_was_written(tmp_path: Path) -> None:
    source, out = digits(), tmp_path / "out"
    shard = out / "train" / "chunk-0-1.bin"

    def damage(doing: str, done: int, total: int) -> None:
        if doing == "packing" and done == total:
            content = bytearray(shard.read_bytes())
            content[-9] ^= 1
            shard.write_bytes(content)

    with pytest.raises(PwsError, match="is not what was written") as raised:
        pack(source, out, 1, damage)
    assert str(shard) in str(raised.value)
    assert not (out / "pws.json").exists()
    index = pack(source, out, 1, quiet)
    assert shard_of(shard) == index.parts["train"][1]


@pytest.mark.slow
def test_processes_write_the_same_files(tmp_path: Path) -> None:
    for jobs in (1, 2):
        pack(digits(), tmp_path / str(jobs), jobs, quiet)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


@pytest.mark.slow
def test_a_process_that_dies_ends_the_packing(tmp_path: Path) -> None:
    source = digits()
    train: list[Entry] = [Deadly(np.zeros((8, 8, 1), np.uint8), 0, "deadly"), *source.parts["train"][1:]]
    with pytest.raises(PwsError, match=r"a process died, .* Lower --jobs"):
        pack(replace(source, parts={**source.parts, "train": train}), tmp_path / "out", 2, quiet)
    assert not (tmp_path / "out" / "pws.json").exists()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    pack_lock = tmp_path / "out" / ".packing" / "lock"
    pack_lock.parent.mkdir(parents=True)
    source = digits()
    (tmp_path / "out" / ".packing" / "source.json").write_text(said_of(source, tmp_path / "other"))
    with pack_lock.open("a") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        child = os.fork()
        if not child:
            os._exit(
                7 if "another process is packing" in refused(lambda: pack(source, tmp_path / "out", 1, quiet)) else 0
            )
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def refused(work: Callable[[], object]) -> str:
    try:
        work()
    except PwsError as error:
        return str(error)
    return ""


def said_of(source: Source, out: Path) -> str:
    """What a packing says of its source in the folder that it works in."""
    found: list[str] = []

    def look(*_: object) -> None:
        found.append((out / ".packing" / "source.json").read_text())

    pack(source, out, 1, look)
    return found[0]


def whole(out: Path) -> None:
    pack(digits(), out, 1, quiet)


def others(out: Path) -> None:
    (out / ".packing").mkdir(parents=True)
    (out / ".packing" / "source.json").write_text("{}")


def mine(out: Path) -> None:
    out.mkdir()
    (out / "mine.txt").write_text("mine")


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "packed images": (whole, "holds packed images already"),
    "other files": (mine, "exists already, and nothing is"),
    "a file": (lambda out: out.write_text("mine"), "exists already, and nothing is"),
    "another packing": (others, "holds an unfinished packing of other images"),
}


@pytest.mark.parametrize(("make", "told"), FOLDERS.values(), ids=FOLDERS)
def test_nothing_is_overwritten(make: Callable[[Path], object], told: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out)
    before = files_of(tmp_path)
    with pytest.raises(PwsError, match=told):
        pack(digits(), out, 1, quiet)
    assert files_of(tmp_path) == before


WRONG: dict[str, tuple[Sequence[str], str]] = {
    "no such folder": (["nowhere", "out"], "'nowhere' is neither"),
    "no classes": (["empty", "out"], "the folder empty/train is missing"),
    "size of small images": (["digits", "out", "--size=32"], "--size is for the images of a folder"),
    "size": (["photos", "out", "--size=1"], "--size must be 8 to 8,192 pixels; got 1"),
    "jobs": (["digits", "out", "--jobs=0"], "--jobs must be at least 1"),
    "no out": (["digits"], "out"),
    "a file above out": (["digits", "file/out"], "must be a folder that can be written to"),
    "an image that can't be resized": (
        ["photos", "out", "--size=16", "--jobs=1"],
        "cannot read the image photos/train",
    ),
    "no files": (["cifar10", "out"], "cifar-10-batches-py is missing"),
}


@pytest.mark.parametrize(("arguments", "told"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_told_in_a_line(
    arguments: Sequence[str],
    told: str,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (photos / "train" / "class0" / "1.png").write_bytes(b"no image")
    assert main(["pack", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pws: ")
    assert told in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "pws.json").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "out"
    assert main(["pack", "digits", str(out), "--jobs=1"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "1,437 train, 360 test images in 3 shards; --data.name stream --data.root" in shown
    index = parse_index((out / "pws.json").read_text(), "pws.json")
    assert index.text() == (out / "pws.json").read_text()
    assert (index.about.size, index.about.channels, index.about.flip) == ((8, 8), 1, False)
    assert json.loads((out / "train" / "index.json").read_text())["config"]["data_format"] == ["bytes", "int", "bytes"]
    assert sorted(path.name for path in out.iterdir()) == ["pws.json", "test", "train"]
