"""What a run keeps of its data, in data.json: what its network needs to be built, and to predict, where the data are not."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import torch
from torch import Tensor

from pws._errors import PwsError, one_line
from pws._files import write_whole
from pws.training.data import ImageData, RecipeData
from pws.training.images import Splits, TensorImages, center_crop
from pws.training.parsing import parse_as
from pws.training.recipe import DataConfig

DATA: Final = "data.json"
STAND_INS: Final = 8
"""Random images that a network is built on; the weights of its checkpoint follow."""


class Facts(Protocol):
    """What a task keeps of its data."""

    @property
    def classes(self) -> list[str]:
        """Their names, in the order of the labels."""

    def stand_in(self, config: DataConfig, seed: int) -> RecipeData:
        """Random data of the same classes and sizes."""


Kind = TypeVar("Kind", bound=Facts)


@dataclass(frozen=True)
class ImageFacts:
    """What a classifier's network must know of its images."""

    classes: list[str]
    mean: list[float]
    """Of each channel's pixels; bytes count as 0 to 1."""
    std: list[float]
    channels: int
    height: int
    width: int
    uint8: bool
    """Whether pixels are bytes; else they are float32."""
    cropped: bool
    """Whether a picture is cropped to this size; else it is resized."""

    @classmethod
    def of(cls, data: Any) -> ImageFacts:
        """Those of a run's data."""
        splits: Splits = data.splits
        pixels, _ = splits.test.get([0])
        _, channels, height, width = pixels.shape
        return cls(
            classes=list(splits.classes),
            mean=list(splits.mean),
            std=list(splits.std),
            channels=channels,
            height=height,
            width=width,
            uint8=pixels.dtype == torch.uint8,
            cropped=not isinstance(splits.test, TensorImages),
        )

    def stand_in(self, config: DataConfig, seed: int) -> ImageData:
        """Random images, the same for training and test."""
        shape, generator = (STAND_INS, self.channels, self.height, self.width), torch.Generator().manual_seed(0)
        pixels = torch.rand(shape, generator=generator)
        images = TensorImages((pixels * 255).to(torch.uint8) if self.uint8 else pixels, torch.zeros(STAND_INS).long())
        return ImageData(config, seed, Splits(images, None, images, self.classes, self.mean, self.std))

    def prepare(self, image: Tensor) -> Tensor:
        """What a file's pixels `(3, H, W)` uint8 become, to be one of these images.

        Raises:
            PwsError: these are no pictures.
        """
        if self.cropped:
            return center_crop(self.height)(image)
        shape = (1, self.channels, self.height, self.width)
        like = torch.empty(shape, dtype=torch.uint8 if self.uint8 else torch.float32)
        return TensorImages(like, torch.zeros(1)).prepare(image)


def write_facts(folder: Path, facts: Any) -> None:
    """Write data.json, whole or not at all."""
    write_whole(folder / DATA, json.dumps(asdict(facts), indent=2, allow_nan=False) + "\n")


def read_facts(folder: Path, kind: type[Kind]) -> Kind:
    """What a run's data.json holds.

    Raises:
        PwsError: there is none, or it is damaged.
    """
    path, again = folder / DATA, f"`pws evaluate {folder}`, where the run's data are, writes it"
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise PwsError(
            f"{path} tells the classes, sizes and normalization of the run's images, and does not exist: the folder is not "
            f"whole, or an older version of pws trained the run. Copy the file too; else {again}."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise PwsError(f"cannot read {path}: {one_line(error)}. Remove it, and {again} again.") from error
    found: Kind = parse_as(kind, content, str(path))
    return found
