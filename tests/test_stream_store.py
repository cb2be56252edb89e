"""`data.root: s3://...`: shards in an object store, here a local server that answers as S3 does where objects are read."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch

from pws._errors import PwsError
from pws.training.data import ImageData
from pws.training.datasets import load_splits
from pws.training.pack import pack
from pws.training.pack_sources import source_of
from pws.training.recipe import DataConfig

URL = "s3://bucket/digits"


class Objects(SimpleHTTPRequestHandler):
    """Answers with the file of an object; S3's client asks for its size first."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A bucket's folder, with packed digits; what a user sets to read it is set."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Objects, directory=str(tmp_path / "store")))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "name",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "2",
        "LITDATA_CACHE_DIR": str(tmp_path / "cache"),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    pack(source_of("digits", "", None, download=False), tmp_path / "store" / "bucket" / "digits", 1, lambda *_: None)
    yield tmp_path / "store" / "bucket"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bucket_gives_the_batches_of_its_folder(bucket: Path, tmp_path: Path, workers: int) -> None:
    here = ImageData(DataConfig(name="stream", root=str(bucket / "digits"), augment=True, batch_size=256), 4)
    there = ImageData(DataConfig(name="stream", root=URL, augment=True, batch_size=256, workers=workers), 4)
    for a, b in zip(here.train_dataloader(), there.train_dataloader(), strict=True):
        assert all(map(torch.equal, a, b))
    assert len(list((tmp_path / "cache").rglob("*.bin"))) == 2


@pytest.mark.parametrize(
    ("missing", "told"),
    [("pws.json", "cannot copy s3://bucket/digits/pws.json .*404"), ("train/chunk-0-1.bin", "chunk-0-1.bin .*404")],
)
def test_an_object_that_is_missing_is_named(bucket: Path, missing: str, told: str) -> None:
    (bucket / "digits" / missing).unlink()
    with pytest.raises(PwsError, match=told):
        load_splits(DataConfig(name="stream", root=URL, validation=0), seed=0).train.get([1200])


def test_a_shard_that_is_cut_off_is_not_kept(bucket: Path) -> None:
    splits = load_splits(DataConfig(name="stream", root=URL, validation=0), seed=0)
    shard = bucket / "digits" / "train" / "chunk-0-1.bin"
    shutil.move(shard, bucket / "whole")
    shard.write_bytes(b"12")
    with pytest.raises(PwsError, match="cut off"):
        splits.train.get([1200])
    shutil.move(bucket / "whole", shard)
    assert len(splits.train.get([1200])[0]) == 1


def test_a_store_that_is_down_ends_soon(monkeypatch: pytest.MonkeyPatch, bucket: Path) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(PwsError, match=r"cannot copy s3://bucket/digits/pws\.json"):
        load_splits(DataConfig(name="stream", root=URL, validation=0), seed=0)
    assert time.monotonic() - started < 20
