"""Augmentation beyond crop and flip: torchvision's v2 transforms, by the names and values of its training script.

An image's pixels are changed before normalization, parts of it erased after that; images are mixed within a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torchvision.transforms import v2

from pws._errors import PwsError
from pws.training.recipe import DataConfig

Erase = Callable[[Tensor], Tensor]
Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
SMOOTH: Final[dict[str, Any]] = {"interpolation": v2.InterpolationMode.BILINEAR}


def auto_augment(config: DataConfig) -> list[v2.Transform]:
    """The step that RandAugment or TrivialAugment adds to those on pixels `(..., 1 or 3, H, W)` uint8; none is the default."""
    if config.auto_augment is None:
        return []
    if config.auto_augment == "ra":
        return [v2.RandAugment(magnitude=config.ra_magnitude, **SMOOTH)]
    return [v2.TrivialAugmentWide(**SMOOTH)]


def check_pixels(config: DataConfig, pixels: Tensor) -> None:
    """Raise `PwsError` unless data.auto_augment can be done to images `(N, C, H, W)` such as these."""
    if config.auto_augment is not None and (pixels.dtype != torch.uint8 or pixels.shape[1] not in (1, 3)):
        raise PwsError(
            f"data.auto_augment changes the colours of images of bytes, in grey or colour; those of {config.name} are "
            f"{pixels.shape[1]} channels of {str(pixels.dtype).removeprefix('torch.')}. Leave it out; data.augment and "
            "data.random_erase take any image."
        )


def erasing(config: DataConfig) -> Erase | None:
    """Puts zeros, which are the mean, into a rectangle of a normalized image; or leaves it as it is."""
    return v2.RandomErasing(p=config.random_erase) if config.random_erase else None


def mixing(config: DataConfig, classes: int, images: int) -> Mix | None:
    """Mixes each image of a batch of `images` with the one before it: labels `(N,)` become shares of `(N, classes)`.

    Where mixup and cutmix are both set, a batch has the one or the other, each as often.

    Raises:
        PwsError: there is no other image.
    """
    kinds = ((v2.MixUp, config.mixup_alpha), (v2.CutMix, config.cutmix_alpha))
    mixes = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha]
    if mixes and images < 2:
        raise PwsError(
            "data.mixup_alpha and data.cutmix_alpha mix the images of a batch, those that one process computes at a time: "
            f"it must have at least 2; got {images}. Raise data.batch_size, lower trainer.accumulate, or leave them out."
        )
    return v2.RandomChoice(mixes) if mixes else None
