"""Images by number, in memory or in files, and what a dataset is made of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
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


@dataclass
class Splits:
    """A dataset, ready to be batched."""

    train: Images
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


def read_image(path: Path) -> Tensor:
    """The pixels `(3, H, W)` uint8 of a file in any of Pillow's formats and modes; 16 bits become 8, alpha is dropped.

    Raises:
        PwsError: no image can be read from it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # from 89 million pixels on
            with Image.open(path) as file:
                image: Tensor = v2.functional.pil_to_tensor(_in_rgb(file))
                return image
    except MemoryError:
        raise
    except Exception as error:  # a file may hold anything, and each format's reader has errors of its own
        raise PwsError(f"cannot read the image {path}: {one_line(error)}. Remove or replace the file.") from error


def _in_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow would cut what is above 255
        image = Image.fromarray((np.asarray(image).clip(0, 2**16 - 1) // 256).astype(np.uint8))
    return image.convert("RGB")


def _image_folder(folder: Path) -> tv.ImageFolder:
    try:
        return tv.ImageFolder(str(folder))
    except (FileNotFoundError, RuntimeError) as error:
        raise PwsError(f"{folder} must hold one folder per class, with images in it: {error}") from error
