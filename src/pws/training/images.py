"""Images by number, in memory or in files, and what a dataset is made of."""

from __future__ import annotations

import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torchvision import datasets as tv
from torchvision.transforms import v2

from pws._errors import PwsError, one_line

Augment = Callable[[Tensor], Tensor]


class CorruptImageError(PwsError):
    """An image that can't be decoded."""


class Images(Protocol):
    """Images by number."""

    augment: Augment | None

    def __len__(self) -> int: ...

    def get(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """Pixels `(N, C, H, W)`, uint8 or float32, and labels `(N,)` int64."""

    def prepare(self, image: Tensor, /) -> Tensor:
        """What a file's pixels `(3, H, W)` uint8 become, to be one of these."""

    def name(self, number: int) -> str:
        """What a picture calls an image."""


@dataclass
class Splits:
    """A dataset, ready to be batched."""

    train: Images
    validation: Images | None
    """What tells the best epoch; None if the recipe wants no such images."""
    test: Images
    classes: list[str]
    mean: Sequence[float]
    """The mean of each channel's pixels; bytes count as 0 to 1."""
    std: Sequence[float]
    order: Callable[[torch.Generator], Tensor] | None = None
    """What draws an epoch's order of the training images; None for any order."""


@dataclass
class TensorImages:
    """Images held in memory."""

    pixels: Tensor
    labels: Tensor
    augment: Augment | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def get(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """Pixels and labels of these images."""
        return self.pixels[numbers], self.labels[numbers]

    def prepare(self, image: Tensor) -> Tensor:
        """In grey if these are, and as large as they are.

        Raises:
            PwsError: these are no pictures.
        """
        channels, height, width = self.pixels.shape[1:]
        if self.pixels.dtype != torch.uint8 or channels not in (1, 3):
            raise PwsError(
                f"this run's images are {channels} channels of {str(self.pixels.dtype).removeprefix('torch.')}, and an image "
                "file holds bytes in grey or colour: nothing tells how one becomes the other. Predict in Python."
            )
        return fitted(image, channels, (height, width))

    def name(self, number: int) -> str:
        """Its number."""
        return f"test image {number}"


class ReadImages(ABC):
    """Images that are read one by one when asked for; up to `max_corrupt` that can't be decoded are replaced.

    Args:
        count: how many there are.
        prepare: what a file's pixels become where they are not augmented.
        augment: what they become in training.
        max_corrupt: in the place of so many at most comes the next one that can be decoded.
    """

    def __init__(self, count: int, prepare: Augment, augment: Augment | None, max_corrupt: int) -> None:
        self.count, self.prepare, self.augment, self.max_corrupt = count, prepare, augment, max_corrupt
        self.numbers: list[int] | None = None
        """Those that are used; None: all."""
        # Loader processes share it: a limit of each would be as many limits.
        self._corrupt = torch.zeros(count if max_corrupt else 0, dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return self.count if self.numbers is None else len(self.numbers)

    @abstractmethod
    def read(self, number: int) -> tuple[Tensor, int]:
        """The pixels `(C, H, W)` uint8 and the label of an image, counted among all.

        Raises:
            CorruptImageError: it can't be decoded.
        """

    @abstractmethod
    def name_of(self, number: int) -> str:
        """What a picture calls an image, counted among all."""

    def name(self, number: int) -> str:
        """What a picture calls an image."""
        return self.name_of(self._used(number))

    def get(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """Pixels and labels of these images; all of one size unless one image is asked for."""
        parts = [self._readable(number) for number in numbers]
        return torch.stack([pixels for pixels, _ in parts]), torch.tensor([label for _, label in parts])

    def _used(self, number: int) -> int:
        return number if self.numbers is None else self.numbers[number]

    def _readable(self, number: int) -> tuple[Tensor, int]:
        """This image or the next that can be decoded: the same one whatever the batch that it is in."""
        for tried in range(len(self)):
            used = self._used((number + tried) % len(self))
            try:
                image, label = self.read(used)
                return (image if self.augment else self.prepare(image)), label
            except CorruptImageError as error:
                self._skip(used, error)
        raise PwsError(f"none of the {len(self):,} images can be decoded; the first is {self.name(0)}.")

    def _skip(self, number: int, error: CorruptImageError) -> None:
        """Say so the first time; raise beyond the limit."""
        if not self.max_corrupt:
            raise PwsError(f"{error} --data.max_corrupt N skips up to N such images.") from error
        if self._corrupt[number]:
            return
        self._corrupt[number] = True  # before it counts: of processes that find one at a time, the last counts all
        found = int(self._corrupt.sum())
        if found > self.max_corrupt:
            self._corrupt[number] = False
            raise PwsError(
                f"{error} It is corrupt image {found}; data.max_corrupt allows {self.max_corrupt}."
            ) from error
        said = (
            f"pws: {error} It is left out, as corrupt image {found} of {self.max_corrupt} that data.max_corrupt allows."
        )
        print(said, file=sys.stderr, flush=True)


class FolderImages(ReadImages):
    """Images in files, one folder per class."""

    def __init__(self, files: tv.ImageFolder, prepare: Augment, augment: Augment | None, max_corrupt: int = 0) -> None:
        self.files = files
        super().__init__(len(files), prepare, augment, max_corrupt)

    def read(self, number: int) -> tuple[Tensor, int]:
        """Read a file."""
        path, label = self.files.samples[number]
        return read_image(Path(path)), label

    def name_of(self, number: int) -> str:
        """The file, with its folder."""
        path = Path(self.files.samples[number][0])
        return f"{path.parent.name}/{path.name}"


def read_image(path: Path, *, upright: bool = False) -> Tensor:
    """The pixels `(3, H, W)` uint8 of a file in any of Pillow's formats and modes; 16 bits become 8, alpha is dropped.

    `upright` turns it as its EXIF data say, as cameras mean it and viewers show it.

    Raises:
        CorruptImageError: no image can be read from it.
    """
    return _decoded(path, f"the image {path}", "Remove or replace the file.", upright=upright)


def decode_image(data: bytes, name: str, *, grey: bool = False) -> Tensor:
    """As `read_image`, of the bytes of a file; `(1, H, W)` if `grey`. `name` is for the error."""
    return _decoded(BytesIO(data), f"the image {name}", "Mend it at its source and pack again.", grey=grey)


def _decoded(file: Path | BytesIO, name: str, advice: str, *, upright: bool = False, grey: bool = False) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # from 89 million pixels on
            with Image.open(file) as opened:
                given = ImageOps.exif_transpose(opened) if upright else opened
                image: Tensor = v2.functional.pil_to_tensor(given.convert("L") if grey else _in_rgb(given))
                return image
    except MemoryError:
        raise
    except Exception as error:  # a file may hold anything, and each format's reader has errors of its own
        raise CorruptImageError(f"cannot read {name}: {one_line(error)}. {advice}") from error


def _in_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow would cut what is above 255
        image = Image.fromarray((np.asarray(image).clip(0, 2**16 - 1) // 256).astype(np.uint8))
    return image.convert("RGB")


def fitted(image: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    """Pixels `(C, H, W)` uint8 in grey if one channel is asked for, of another height and width."""
    if channels == 1 and image.shape[0] == 3:
        # Of bytes torchvision would cut the fraction off, and grey pixels would come out darker by 1.
        image = v2.functional.rgb_to_grayscale(image.float()).round().to(torch.uint8)
    return resized(image[None], size)[0]


def center_crop(side: int) -> Augment:
    """What takes the square in the middle of a picture, 7/8 of its shorter side, in `side` pixels."""
    crop: Augment = v2.Compose([v2.Resize(round(side * 256 / 224)), v2.CenterCrop(side)])
    return crop


def resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels `(N, C, H, W)` of another height and width."""
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    other: Tensor = F.interpolate(pixels.float(), size, mode="bilinear", antialias=True, align_corners=False)
    return other.round().clamp(0, 255).to(torch.uint8) if pixels.dtype == torch.uint8 else other


def image_folder(folder: Path) -> tv.ImageFolder:
    """The files of a folder per class.

    Raises:
        PwsError: there are none.
    """
    try:
        return tv.ImageFolder(str(folder))
    except (FileNotFoundError, RuntimeError) as error:
        raise PwsError(f"{folder} must hold one folder per class, with images in it: {error}") from error
