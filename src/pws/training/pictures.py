"""Pictures with text: fonts, colours that text can be read on, and the classes found in an image."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

Colour = tuple[int, int, int]
FONT: Final = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
GREEN: Final = (0, 200, 0)
"""Of what is true."""
BLACK: Final = (0, 0, 0)
WHITE: Final = (255, 255, 255)
GREY: Final = (225, 225, 225)
BLUE: Final = (36, 113, 163)
SIDE: Final = 480
"""Pixels of the longer side of a classified image in its picture."""
TEXT: Final = 17
BARS: Final = 300
"""Width of a bar of probability 1."""
LONGEST: Final = 36
"""Characters of a name in a picture."""


def font_of(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's, which knows the letters of most languages written in Latin, Greek and Cyrillic."""
    return ImageFont.truetype(str(FONT), size)


def colour_of(label: int) -> Colour:
    """A strong colour for a class, which neighbouring labels do not share and which is not the green of the truth."""
    hue = 0.47 + 0.7 * ((label * 0.618034) % 1)
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def text_colour_on(ground: Colour) -> Colour:
    """Black or white, whichever can be read better."""
    red, green, blue = ((c / 255) ** 2.2 for c in ground)
    return BLACK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else WHITE


def scaled_to(image: Tensor, side: int) -> Image.Image:
    """Pixels `(C, H, W)` uint8 as an image whose longer side has so many pixels."""
    picture: Image.Image = TF.to_pil_image(image).convert("RGB")
    factor = side / max(picture.size)
    size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
    return picture.resize(size, Image.Resampling.BICUBIC if max(picture.size) > 64 else Image.Resampling.NEAREST)


def shortened(name: str, longest: int = LONGEST) -> str:
    """A name, without its beginning if it is longer: files differ at their ends."""
    return name if len(name) <= longest else f"…{name[1 - longest :]}"


def draw_classes(image: Tensor, classes: Sequence[tuple[str, float]]) -> Image.Image:
    """The image, and a bar for the probability of each class beside it."""
    picture, row = scaled_to(image, SIDE), round(TEXT * 2.9)
    sheet = Image.new("RGB", (picture.width + BARS + 130, max(picture.height, row * len(classes)) + 20), WHITE)
    sheet.paste(picture, (10, 10))
    pen, font, left = ImageDraw.Draw(sheet), font_of(TEXT), picture.width + 30
    for number, (name, probability) in enumerate(classes):
        top = 8 + number * row
        pen.text((left, top), shortened(name), BLACK, font)
        bar = top + TEXT + 6
        pen.rectangle((left, bar, left + BARS, bar + 14), GREY)
        pen.rectangle((left, bar, left + round(BARS * probability), bar + 14), BLUE)
        pen.text((left + BARS + 8, bar + 7), f"{100 * probability:.1f} %", BLACK, font, anchor="lm")
    return sheet
