"""Images by number, in memory or in files, and what a dataset is made of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
        # Of bytes torchvision would cut the fraction off, and grey pixels would come out darker by 1.
        pixels = v2.functional.rgb_to_grayscale(image.float()).round().to(torch.uint8) if channels == 1 else image
        return resized(pixels[None], (height, width))[0]

    def name(self, number: int) -> str:
        """Its number."""
        return f"test image {number}"


class FolderImages:
    """Images in files, one folder per class, read when asked for."""

    def __init__(
        self, folder: Path, prepare: Augment, augment: Augment | None, numbers: list[int] | None = None
    ) -> None:
        self.files, self.prepare, self.augment = _image_folder(folder), prepare, augment
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.files) if self.numbers is None else len(self.numbers)

    def get(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """Pixels and labels of these images; all of one size unless one image is asked for."""
        chosen = numbers if self.numbers is None else [self.numbers[n] for n in numbers]
        parts = [self._read(number) for number in chosen]
        return torch.stack([pixels for pixels, _ in parts]), torch.tensor([label for _, label in parts])

    def _read(self, number: int) -> tuple[Tensor, int]:
        path, label = self.files.samples[number]
        image = read_image(Path(path))
        return (image if self.augment else self.prepare(image)), label

    def name(self, number: int) -> str:
        """The file, with its folder."""
        path = Path(self.files.samples[number if self.numbers is None else self.numbers[number]][0])
        return f"{path.parent.name}/{path.name}"


def read_image(path: Path, *, upright: bool = False) -> Tensor:
    """The pixels `(3, H, W)` uint8 of a file in any of Pillow's formats and modes; 16 bits become 8, alpha is dropped.

    `upright` turns it as its EXIF data say, as cameras mean it and viewers show it.

    Raises:
        PwsError: no image can be read from it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # from 89 million pixels on
            with Image.open(path) as file:
                image: Tensor = v2.functional.pil_to_tensor(_in_rgb(ImageOps.exif_transpose(file) if upright else file))
                return image
    except MemoryError:
        raise
    except Exception as error:  # a file may hold anything, and each format's reader has errors of its own
        raise PwsError(f"cannot read the image {path}: {one_line(error)}. Remove or replace the file.") from error


def _in_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow would cut what is above 255
        image = Image.fromarray((np.asarray(image).clip(0, 2**16 - 1) // 256).astype(np.uint8))
    return image.convert("RGB")


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


def _image_folder(folder: Path) -> tv.ImageFolder:
    try:
        return tv.ImageFolder(str(folder))
    except (FileNotFoundError, RuntimeError) as error:
        raise PwsError(f"{folder} must hold one folder per class, with images in it: {error}") from error
