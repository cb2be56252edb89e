"""What `pws pack` reads: a folder per class, or a dataset that is held in memory."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from pws._errors import PwsError
from pws.training.datasets import PHOTO_MEAN, PHOTO_STD, class_folders, load_splits
from pws.training.images import TensorImages, read_image
from pws.training.recipe import DataConfig
from pws.training.shards import ImagesIndex, Label, ObjectsIndex, Sizes, StoredImage

IN_MEMORY: Final = ("digits", "fashion-mnist", "cifar10", "cifar100")
QUALITY: Final = 95
"""Of JPEG files that are written in another size."""
MOST_IMAGES: Final = 1000
MOST_BYTES: Final = 64 * 2**20
"""Of a shard, in the mean."""
T = TypeVar("T")


class Entry(ABC):
    """An image to be stored."""

    label: Label
    name: str

    @abstractmethod
    def data(self) -> bytes:
        """The bytes of its file."""

    def stored(self) -> StoredImage:
        """For the shard; litdata takes some words for paths, so the name is bytes."""
        return self.data(), self.label, self.name.encode()


@dataclass(frozen=True)
class FileEntry(Entry):
    """An image in a file, whose bytes are kept unless its shorter side is longer than `size`."""

    path: Path
    label: Label
    name: str
    size: int | None

    def data(self) -> bytes:
        """Read, and write in another size where that is asked for."""
        data = self.path.read_bytes()
        if self.size is None:
            return data
        pixels = read_image(self.path)
        if min(pixels.shape[-2:]) <= self.size:
            return data
        image = TF.to_pil_image(TF.resize(pixels, [self.size]))
        return _written(image, "JPEG" if data.startswith(b"\xff\xd8") else "PNG")


@dataclass(frozen=True)
class ArrayEntry(Entry):
    """An image in memory."""

    pixels: NDArray[np.uint8]
    """`(H, W, C)`. No tensor: torch would hand each to another process as a file of its own."""
    label: int
    name: str

    def data(self) -> bytes:
        """As PNG, which loses nothing."""
        return _written(Image.fromarray(self.pixels.squeeze(2) if self.pixels.shape[2] == 1 else self.pixels), "PNG")


def _written(image: Image.Image, kind: str) -> bytes:
    file = BytesIO()
    image.save(file, kind, **({"quality": QUALITY} if kind == "JPEG" else {}))
    return file.getvalue()


@dataclass(frozen=True)
class Source:
    """Images to be packed."""

    name: str
    about: ImagesIndex | ObjectsIndex
    parts: dict[str, Sequence[Entry]]
    """Training images are in an order drawn once: classes lie mixed in every shard."""
    bytes: int
    """Of all, about."""
    digest: str
    """Tells whether a packing goes on with the images that it began with."""
    sizes: Sizes = field(default_factory=dict)
    """Of images with objects."""

    @property
    def images(self) -> int:
        """Of all parts."""
        return sum(map(len, self.parts.values()))

    def shard_images(self) -> int:
        """Images of a shard."""
        return max(1, min(MOST_IMAGES, MOST_BYTES * self.images // max(1, self.bytes)))


def folder_source(root: Path, size: int | None) -> Source:
    """The images of root/train/CLASS, root/val/CLASS and perhaps root/test/CLASS.

    Raises:
        PwsError: as `class_folders`.
    """
    files, digest, total = class_folders(root, "pws pack"), hashlib.sha256(), 0
    parts: dict[str, Sequence[Entry]] = {}
    for part, found in files.items():
        entries = []
        for file, label in found.samples:
            path = Path(file)
            entry = FileEntry(path, label, f"{path.parent.name}/{path.name}", size)
            length = path.stat().st_size
            total += length
            digest.update(f"{part}/{entry.name} {label} {length}\n".encode())
            entries.append(entry)
        parts[part] = mixed(entries) if part == "train" else entries
    classes = files["train"].classes
    about = ImagesIndex(classes, list(PHOTO_MEAN), list(PHOTO_STD), channels=3, size=None, flip=True)
    return Source(str(root), about, parts, total, digest.hexdigest())


def memory_source(name: str, root: str, *, download: bool) -> Source:
    """The images of a dataset by its name.

    Raises:
        PwsError: as `load_splits`.
    """
    splits = load_splits(DataConfig(name=name, root=root, download=download, validation=0), seed=0)
    digest, total = hashlib.sha256(), 0
    parts: dict[str, Sequence[Entry]] = {}
    for part, images in (("train", splits.train), ("test", splits.test)):
        assert isinstance(images, TensorImages)
        digest.update(images.pixels.numpy().tobytes() + images.labels.numpy().tobytes())
        total += images.pixels.numel()
        arrays = images.pixels.permute(0, 2, 3, 1).numpy()
        entries = [
            ArrayEntry(pixels, label, f"{part}/{number}")
            for number, (pixels, label) in enumerate(zip(arrays, images.labels.tolist(), strict=True))
        ]
        parts[part] = mixed(entries) if part == "train" else entries
        channels, height, width = images.pixels.shape[1:]
    mean, std = list(splits.mean), list(splits.std)
    about = ImagesIndex(splits.classes, mean, std, channels, (height, width), flip=name != "digits")
    return Source(name, about, parts, total, digest.hexdigest())


def mixed(entries: Sequence[T]) -> list[T]:
    """The same in an order drawn once."""
    order = torch.randperm(len(entries), generator=torch.Generator().manual_seed(0))
    return [entries[number] for number in order.tolist()]


def source_of(given: str, root: str, size: int | None, *, download: bool) -> Source:
    """A folder's images, or a dataset's by its name.

    Raises:
        PwsError: neither is there.
    """
    if given in IN_MEMORY:
        if size is not None:
            raise PwsError(f"--size is for the images of a folder; those of {given} are small already. Leave it out.")
        return memory_source(given, root, download=download)
    if not Path(given).is_dir():
        raise PwsError(
            "pws pack takes a folder (with train/CLASS/... and val/CLASS/..., or with COCO's annotations/ beside folders of "
            f"images), or one of {', '.join(IN_MEMORY)}; {given!r} is neither."
        )
    return folder_source(Path(given), size)
