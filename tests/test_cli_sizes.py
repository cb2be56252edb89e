"""Sizes beyond the machine: refused before the work, in one line."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_data import write_folder, write_npz

from pws._errors import PwsError
from pws.cli import main
from pws.training import memory
from pws.training.array_files import read_idx, read_npz

TRAIN = (
    *("train", "fashion-mnist-allconv-pws", "--data.name=digits", "--data.image_size=12", "--data.train_images=64"),
    *("--data.batch_size=32", "--model.width=0.08", "--trainer.epochs=1", "--trainer.accelerator=cpu"),
)
MODEL = ("diagnose", "--model=pws.models.small:resnet18")
HUGE = 10**12


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("pws: ")
    assert said.count("\n") == 1, said
    return said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*TRAIN, "--model.width=1e6"), "model.width must be positive, and at most 1,000"),
        ((*TRAIN, "--model.width=900"), "GiB of memory"),
        ((*TRAIN, "--data.image_size=1000000"), "data.image_size must be"),
        ((*TRAIN, "--data.image_size=60000"), "GiB of memory"),
        ((*TRAIN, f"--data.batch_size={HUGE}"), "data.batch_size must be"),
        ((*TRAIN, "--data.workers=100000"), "data.workers must be"),
        ((*TRAIN, f"--seed={2**32}"), "seed must be at least 0 and below 2 ** 32"),
        ((*TRAIN, "--seed=-1"), "seed must be"),
        ((*TRAIN, f"--trainer.epochs={HUGE}"), "trainer.epochs must be"),
        ((*TRAIN, "--trainer.devices=100000"), "trainer.devices must be"),
        ((*TRAIN, f"--trainer.num_nodes={HUGE}"), "trainer.num_nodes must be"),
        ((*MODEL, "--image-size=100000", "--batch-size=2"), "GiB of memory"),
        ((*MODEL, f"--batch-size={HUGE}"), "GiB of memory"),
        ((*MODEL, "--data=digits", "--image-size=60000", "--batch-size=2"), "GiB of memory"),
        (("convert", *MODEL[1:], f"--batch-size={HUGE}", "--out=none"), "GiB of memory"),
        (("bench", "speed", *MODEL[1:], f"--batch-size={HUGE}"), "GiB of memory"),
        (("demo", f"--epochs={HUGE}"), "--epochs must be"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_flags(
    arguments: tuple[str, ...],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["seed", "model.width", "data.batch_size", "data.image_size", "data.workers"])
@pytest.mark.parametrize("value", ["1e400", "-1e400", str(10**400), str(-(10**400)), ".nan"])
def test_numbers_beyond_numbers(
    key: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, *TRAIN, f"--{key}={value}")
    assert key in said or "a number is beyond what a float can be" in said


def npy(shape: tuple[int, ...], content: bytes, dtype: str = "|u1") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + content


@pytest.mark.parametrize("key", ["train_images", "test_images", "train_labels"])
def test_an_npz_that_declares_terabytes(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "data.npz"
    write_npz(path)
    with np.load(path) as file:
        arrays = dict(file)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, array in arrays.items():
            whole = io.BytesIO()
            np.save(whole, array)
            file.writestr(f"{name}.npy", npy((10**7, 1000, 1000), b"few") if name == key else whole.getvalue())
    flags = ("--data.name=npz", f"--data.root={path}", "--data.train_images=null", f"--runs={tmp_path / 'runs'}")
    assert "GiB of memory" in refused(capsys, *TRAIN, *flags)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.full(20, 10**9), "the largest is 1,000,000,000"),
        (np.full(20, 2**63, np.uint64), "from 0 on|whole numbers"),
        (np.full(20, 0.5), "whole numbers"),
        (np.full(20, np.nan), "whole numbers"),
        (np.full(20, 1j), "whole numbers"),
        (np.full(20, -1), "from 0 on"),
    ],
    ids=["billion", "2**63", "half", "nan", "complex", "negative"],
)
def test_labels(labels: np.ndarray, words: str, tmp_path: Path) -> None:
    write_npz(tmp_path / "data.npz")
    with np.load(tmp_path / "data.npz") as file:
        np.savez(tmp_path / "data.npz", **{**dict(file), "train_labels": labels})
    with pytest.raises(PwsError, match=words):
        read_npz(tmp_path / "data.npz")


def test_compressed_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = bytes([0, 0, 8, 1]) + struct.pack(">I", 10)
    path = tmp_path / "labels.gz"
    path.write_bytes(gzip.compress(labels + bytes(10_000_000)))
    with pytest.raises(PwsError, match="11 bytes could be read"):  # and no more of the ten million were
        read_idx(path, ())
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 1]) + struct.pack(">I", 2**32 - 1)))
    monkeypatch.setattr(memory, "memory_limit", lambda: 2**30)
    with pytest.raises(PwsError, match="GiB of memory"):
        read_idx(path, ())
    path.write_bytes(gzip.compress(labels + bytes(10)))
    assert read_idx(path, ()).tolist() == [0] * 10


def png(width: int, height: int) -> bytes:
    """A black picture of one bit a pixel, which holds almost nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 30_000])
@pytest.mark.parametrize("part", ["train", "val"])
def test_pictures_of_a_hundred_million_pixels(
    side: int, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "data", classes=2, images=2, side=40)
    bomb = tmp_path / "data" / part / "class0" / "0.png"
    bomb.write_bytes(png(side, side))
    assert side**2 > Image.MAX_IMAGE_PIXELS  # type: ignore[operator]
    flags = ("--data.name=folder", f"--data.root={tmp_path / 'data'}", "--data.train_images=null")
    runs = tmp_path / "runs"
    said = refused(capsys, *TRAIN, *flags, "--data.batch_size=4", f"--runs={runs}")
    assert f"cannot read the image {bomb}" in said
    assert "decompression bomb" in said
    assert not runs.exists() or not any(runs.iterdir())


def test_the_limit_is_the_smallest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "max").write_text("1000000\n")
    monkeypatch.setattr(memory, "GROUP_LIMIT", tmp_path / "max")
    assert memory.memory_limit() == 1_000_000
    memory.check_memory(1_000_000, "it")
    with pytest.raises(PwsError, match="it needs"):
        memory.check_memory(1_000_001, "it")
    (tmp_path / "max").write_text("max\n")
    assert memory.memory_limit() > 2**28
