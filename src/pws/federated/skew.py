"""What each client's images look like: feature skew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from pws._errors import PwsError

Change = Callable[[Tensor, Sequence[int]], Tensor]
"""From pixels `(N, C, H, W)` uint8 and the numbers of their images to other pixels."""
DARKEST: Final = 0.2
"""Brightness of the last client's images."""
NOISE: Final = 50.0
"""Deviation of the noise; pixels go to 255."""


def _same(pixels: Tensor, _: Sequence[int]) -> Tensor:
    return pixels


def _turned(angle: float, pixels: Tensor, _: Sequence[int]) -> Tensor:
    turned: Tensor = TF.rotate(pixels, angle, InterpolationMode.BILINEAR)
    return turned


def _darkened(brightness: float, pixels: Tensor, _: Sequence[int]) -> Tensor:
    return (pixels * brightness).round().to(pixels.dtype)


def _inverted(pixels: Tensor, _: Sequence[int]) -> Tensor:
    return 255 - pixels


def _blurred(pixels: Tensor, _: Sequence[int]) -> Tensor:
    side = 2 * (min(pixels.shape[-2:]) // 16) + 3
    blurred: Tensor = TF.gaussian_blur(pixels, [side, side])
    return blurred


def _noisy(pixels: Tensor, numbers: Sequence[int]) -> Tensor:
    """An image has the same noise in each epoch."""
    drawn = [torch.randn(pixels.shape[1:], generator=torch.Generator().manual_seed(number)) for number in numbers]
    return (pixels + NOISE * torch.stack(drawn)).round().clamp(0, 255).to(pixels.dtype)


DOMAINS: Final[tuple[Change, ...]] = (_same, _inverted, _blurred, _noisy)


def changes_of(skew: str, clients: int) -> list[Change]:
    """What each client's images go through."""
    numbers = range(clients)
    if skew == "rotate":
        return [partial(_turned, 90 * number / clients) for number in numbers]
    if skew == "dark":
        return [partial(_darkened, 1 - (1 - DARKEST) * number / max(1, clients - 1)) for number in numbers]
    return [DOMAINS[number % len(DOMAINS)] if skew == "domains" else _same for number in numbers]


def check_skew(skew: str, pixels: Tensor) -> None:
    """Raise `PwsError` if images of this kind can't be changed."""
    if skew != "none" and pixels.dtype != torch.uint8:
        raise PwsError(
            f"federated.skew {skew} changes images of bytes, and these are {str(pixels.dtype).removeprefix('torch.')}. Take "
            "federated.skew none."
        )
