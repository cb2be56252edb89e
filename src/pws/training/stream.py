"""Images in shards, as `pws pack` writes them: in a folder, or behind a URL from which shards are copied when needed."""

from __future__ import annotations

import hashlib
import os
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from pws._errors import PwsError, one_line
from pws.training.images import Augment, ReadImages, decode_image
from pws.training.shards import (
    INDEX,
    LITDATA_INDEX,
    ImagesIndex,
    ObjectsIndex,
    Shard,
    ShardIndex,
    StoredImage,
    check_size,
    check_sizes,
    parse_index,
    task_of,
)

WINDOW: Final = 8
"""Shards that are open at a time, among whose images an epoch's order is drawn."""
PATIENCE: Final = 600
"""Seconds that a process waits for another one that copies the shard that it needs."""
About = TypeVar("About", ImagesIndex, ObjectsIndex)


_SETTINGS: Final = {
    "LITDATA_DISABLE_VERSION_CHECK": "1",  # it would ask the package index for a newer version each time
    "LITDATA_POSIX_PAGE_BYTES": "0",  # it would look ahead for the images that follow, and ours are drawn
}


def litdata() -> Any:
    """The library, set up for what is done here.

    Raises:
        PwsError: it is not installed.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import litdata.streaming.downloader
        import litdata.streaming.sampler
        import litdata.streaming.writer
    except ImportError as error:
        raise PwsError(
            f"packed images need litdata ({error.name} is missing): pip install 'pws-torch[stream]'."
        ) from error
    # Its faster client of object stores takes no http:// address, and must not start before loader processes are forked.
    litdata.streaming.downloader._OBSTORE_AVAILABLE = False
    return litdata


@dataclass(frozen=True)
class PackedFolder:
    """Where a packed dataset lies: its files are in `folder`, or are copied there from `url` when they are asked for."""

    folder: Path
    url: str | None
    index: ShardIndex

    @property
    def where(self) -> str:
        """The folder, or the URL, that was given."""
        return self.url or str(self.folder)

    def about(self, kind: type[About]) -> About:
        """What the images are.

        Raises:
            PwsError: they were packed for another task.
        """
        about = self.index.about
        if isinstance(about, kind):
            return about
        packed, wanted = task_of(type(about)), task_of(kind)
        raise PwsError(
            f"{self.where} holds images that were packed for task {packed}, and this recipe's task is {wanted}. "
            f"Name the folder of another packing with --data.root, or take a recipe of task {packed}."
        )

    def fetch(self, part: str, shard: Shard) -> None:
        """Have a shard's file in the folder."""
        if self.url is not None and not (self.folder / part / shard.file).exists():
            copy_from(f"{self.url}/{part}", shard.file, self.folder / part)
            try:
                check_size(self.folder / part / shard.file, shard)
            except PwsError:
                (self.folder / part / shard.file).unlink()  # the store's may be mended
                raise


def open_packed(root: str) -> PackedFolder:
    """The packed dataset in a folder or behind a URL.

    Raises:
        PwsError: litdata is missing, or the dataset is not there, not whole, or of another version.
    """
    litdata()
    if "://" in root or root.startswith("local:"):
        return _remote(root.rstrip("/"))
    folder = Path(root)
    path = folder / INDEX
    if not path.is_file():
        raise PwsError(
            f"{path} is missing: {folder} holds no packed images, or their packing was not finished. Pack them with `pws pack "
            f"FOLDER {folder}`, which also goes on with an unfinished packing."
        )
    index = parse_index(path.read_text(encoding="utf-8"), str(path))
    check_sizes(folder, index)
    return PackedFolder(folder, None, index)


def _remote(url: str) -> PackedFolder:
    with TemporaryDirectory() as temporary:
        copy_from(url, INDEX, Path(temporary))
        text = (Path(temporary) / INDEX).read_text(encoding="utf-8")
    index = parse_index(text, f"{url}/{INDEX}")
    kept = Path(os.environ.get("LITDATA_CACHE_DIR") or Path.home() / ".lightning" / "chunks")
    folder = kept / "pws" / hashlib.sha256(f"{url}\n{text}".encode()).hexdigest()[:16]
    for part in index.parts:
        if not (folder / part / LITDATA_INDEX).exists():
            copy_from(f"{url}/{part}", LITDATA_INDEX, folder / part)
    return PackedFolder(folder, url, index)


def copy_from(url: str, name: str, folder: Path) -> None:
    """Copy a file with litdata, whole or not at all; a process that finds another one at it waits for that."""
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + PATIENCE
    try:
        # None: the user's settings of AWS count. litdata's own would try a thousand times.
        options = {"config": None} if url.startswith("s3://") else {}
        downloader = litdata().streaming.downloader.get_downloader(url, str(folder), [], options)
        while True:
            downloader.download_file(f"{url}/{name}", str(folder / name))
            if (folder / name).exists():
                return
            if time.monotonic() > end:
                raise TimeoutError(f"another process has not copied it in {PATIENCE} s")
            time.sleep(0.1)
    except PwsError:
        raise
    except Exception as error:  # each store's client has errors of its own
        raise PwsError(
            f"cannot copy {url}/{name} to {folder}: {type(error).__name__}: {one_line(error)}. Check the address, the access "
            "to it and the space on the disk."
        ) from error


class PackedPart:
    """What the shards of one part hold, by number."""

    def __init__(self, packed: PackedFolder, part: str) -> None:
        self.packed, self.part = packed, part
        self.shards = packed.index.parts[part]
        self.starts = [0, *accumulate(shard.images for shard in self.shards)]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        # Each process maps the files itself.
        return {name: value for name, value in vars(self).items() if name != "_stored"}

    def order(self, numbers: Sequence[int] | None, generator: torch.Generator) -> Tensor:
        """An order of the images of these numbers (None: all), some shards after the other: few are read at a time."""
        used = torch.arange(len(self)) if numbers is None else torch.tensor(numbers)
        shards = torch.bucketize(used, torch.tensor(self.starts), right=True) - 1
        return drawn_by_shards(shards, len(self.shards), generator, WINDOW)

    def name(self, number: int) -> str:
        """What an image was called when it was packed."""
        return bytes(self.item(number)[2]).decode()

    def item(self, number: int) -> StoredImage:
        """What is stored of an image; its shard is copied first if that is needed."""
        place = bisect_right(self.starts, number) - 1
        shard = self.shards[place]
        self.packed.fetch(self.part, shard)
        try:
            return self._stored(number, place)
        except Exception as error:  # litdata's, or the system's
            path = self.packed.folder / self.part / shard.file
            raise PwsError(f"cannot read image {number} of the shard {path}: {one_line(error)}.") from error

    @cached_property
    def _stored(self) -> Callable[[int, int], StoredImage]:
        """Reads an image by its number and its shard's; litdata maps so many shards into memory."""
        library, folder = litdata(), self.packed.folder / self.part
        data = library.StreamingDataset(str(folder), max_pre_download=WINDOW, batch_decode=0)
        index = library.streaming.sampler.ChunkedIndex
        return lambda number, place: data[index(number, place)]


class StreamImages(ReadImages):
    """Images in shards, each with a class."""

    def __init__(
        self, packed: PackedFolder, part: str, prepare: Augment, augment: Augment | None, max_corrupt: int = 0
    ) -> None:
        self.stored, self.grey = PackedPart(packed, part), packed.about(ImagesIndex).channels == 1
        super().__init__(len(self.stored), prepare, augment, max_corrupt)

    def read(self, number: int) -> tuple[Tensor, int]:
        """Read an image from its shard."""
        data, label, name = self.stored.item(number)
        return decode_image(bytes(data), bytes(name).decode(), grey=self.grey), int(label)

    def name_of(self, number: int) -> str:
        """What it was called when it was packed."""
        return self.stored.name(number)

    def order(self, generator: torch.Generator) -> Tensor:
        """The images, in an order that goes through the shards."""
        return self.stored.order(self.numbers, generator)


def drawn_by_shards(shards: Tensor, count: int, generator: torch.Generator, window: int) -> Tensor:
    """An order of images: the shards drawn, cut into windows, the images of each window drawn.

    Args:
        shards: the shard of each image.
        count: of shards.
        generator: draws.
        window: shards of a window.
    """
    windows = torch.empty(count, dtype=torch.long)
    windows[torch.randperm(count, generator=generator)] = torch.arange(count) // window
    order = torch.randperm(len(shards), generator=generator)
    return order[windows[shards[order]].argsort(stable=True)]
