"""Scenes: small images of known objects cut out along their outline and placed on a canvas, with exact boxes and masks.

Image `i` of a part depends on the seed, the part and `i` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from PIL import Image, ImageDraw

SIDES: Final = (0.105, 0.525)
"""The longer side of an object, in parts of the canvas: 0.6 to 3 times an object of 28 pixels on one of 160."""
WHOLE: Final = (0.75, 1.0)
"""The same of a single object."""
EMPTY: Final = 0.05
"""The share of scenes without objects."""
MOST: Final = 6
"""Objects of a scene."""
VISIBLE: Final = 0.35
"""Each object shows at least this share of itself."""
SMALLEST: Final = 24
"""Pixels that each object shows at least."""
CLUTTER: Final = 8
"""Lines and ellipses of a scene at most."""

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Cutouts:
    """Grey images `(N, H, W)` uint8 of one object each, on black, and their classes."""

    pixels: Array
    labels: Array
    classes: Sequence[str]
    outline: int = 25
    """Pixels brighter than this belong to the object, after it was scaled."""
    mirrored: bool = True
    """Every second one."""


@dataclass(frozen=True)
class Scene:
    """An image `(H, W, 3)` uint8; the visible part of each object `(N, H, W)` bool, and its class."""

    image: Array
    masks: Array
    labels: Array


def draw_scene(cutouts: Cutouts, size: int, *, seed: int, part: int, number: int) -> Scene:
    """Scene `number` of a part, `size` pixels per side."""
    rng = np.random.default_rng([seed, part, number])
    image = _background(rng, size)
    masks: list[Array] = []
    areas: list[int] = []
    labels: list[int] = []
    wanted = 0 if rng.random() < EMPTY else int(rng.integers(1, MOST + 1))
    for _ in range(wanted):
        chosen = int(rng.integers(len(cutouts.labels)))
        new = _place(rng, cutouts, chosen, size, SIDES)
        shown = [*(mask & ~new.mask for mask in masks), new.mask]
        whole = [*areas, new.area]
        if any(mask.sum() < max(SMALLEST, VISIBLE * area) for mask, area in zip(shown, whole, strict=True)):
            continue  # it would hide another object, or is hardly on the canvas
        masks, areas = shown, whole
        labels.append(int(cutouts.labels[chosen]))
        image = _painted(rng, image, new)
    stacked = np.stack(masks) if masks else np.zeros((0, size, size), bool)
    return Scene(image, stacked, np.array(labels, np.int64))


@dataclass(frozen=True)
class _Object:
    canvas: Array
    """The object at its place, black elsewhere."""
    mask: Array
    """Where it is."""
    area: int
    """Pixels of the whole object, those beyond the canvas too."""


def _place(rng: np.random.Generator, cutouts: Cutouts, chosen: int, size: int, sides: tuple[float, float]) -> _Object:
    """The object at a place of its own; its longer side is drawn from this range, in parts of the canvas."""
    pixels = cutouts.pixels[chosen]
    scale = size * float(np.exp(rng.uniform(*np.log(sides)))) / max(pixels.shape)
    height, width = (max(4, round(scale * length)) for length in pixels.shape)
    flipped = np.ascontiguousarray(pixels[:, ::-1] if rng.random() < 0.5 and cutouts.mirrored else pixels)
    drawn = np.asarray(Image.fromarray(flipped).resize((width, height), Image.Resampling.BILINEAR))
    # A quarter of it may lie beyond each border.
    top, left = (int(rng.integers(-(side // 4), max(1, size - 3 * side // 4))) for side in (height, width))
    canvas = np.zeros((size, size), np.uint8)
    rows, columns = slice(max(0, top), min(size, top + height)), slice(max(0, left), min(size, left + width))
    canvas[rows, columns] = drawn[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    return _Object(canvas, canvas > cutouts.outline, int((drawn > cutouts.outline).sum()))


def _painted(rng: np.random.Generator, image: Array, new: _Object) -> Array:
    """The object over the image, in a colour of its own."""
    colour = rng.uniform(0.35, 1.0, 3)
    floor = rng.uniform(0.0, 60.0)
    painted = floor + new.canvas[..., None].astype(np.float64) * colour * (255 - floor) / 255
    return np.where(new.mask[..., None], painted.round().astype(np.uint8), image)


def _background(rng: np.random.Generator, size: int) -> Array:
    """A gradient between two colours, with lines, ellipses and noise."""
    first, second = rng.uniform(20, 220, (2, 3))
    angle = rng.uniform(0, 2 * np.pi)
    across = np.linspace(-0.5, 0.5, size)
    ramp = np.clip(0.5 + np.cos(angle) * across[None, :] + np.sin(angle) * across[:, None], 0, 1)[..., None]
    picture = Image.fromarray((first * (1 - ramp) + second * ramp).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(0, CLUTTER + 1))):
        corners = rng.uniform(-0.2, 1.2, 4) * size
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        width = int(rng.integers(1, max(2, size // 16)))
        if rng.random() < 0.5:
            pen.line([tuple(corners[:2]), tuple(corners[2:])], fill=colour, width=width)
        else:
            box = [*np.minimum(corners[:2], corners[2:]), *np.maximum(corners[:2], corners[2:])]
            pen.ellipse(box, outline=colour, width=width, fill=colour if rng.random() < 0.3 else None)
    noise = rng.normal(0, rng.uniform(2, 12), (size, size, 1))
    return np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)


def draw_object(cutouts: Cutouts, size: int, *, seed: int, part: int, number: int) -> tuple[Array, int]:
    """An image `(size, size, 3)` uint8 of one object, whole or nearly so, over most of the image; and its class."""
    rng = np.random.default_rng([seed, part, number, 1])
    chosen = int(rng.integers(len(cutouts.labels)))
    image = _background(rng, size)
    while True:
        new = _place(rng, cutouts, chosen, size, WHOLE)
        if new.mask.sum() >= 0.9 * new.area:
            return _painted(rng, image, new), int(cutouts.labels[chosen])
