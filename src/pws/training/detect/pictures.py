"""Objects drawn on their image: masks, boxes, keypoints and names that do not lie on each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_bounding_boxes, draw_keypoints, draw_segmentation_masks

from pws.training.detect.objects import SeenObject
from pws.training.pictures import GREEN, Colour, colour_of, font_of, scaled_to, text_colour_on

Place = tuple[float, float, float, float]


def draw_objects(image: Tensor, objects: Sequence[SeenObject], side: int) -> Image.Image:
    """The image `(3, H, W)` uint8, its longer side resized to so many pixels, with the objects.

    True objects have a green outline. Each of the others has a colour of its class.
    """
    canvas = TF.pil_to_tensor(scaled_to(image, side))
    factors = torch.tensor(canvas.shape[:0:-1]) / torch.tensor(image.shape[:0:-1])  # across, down
    width = max(2, side // 300)
    if not objects:
        return _as_image(canvas)
    colours = [_colour(one) for one in objects]
    for one, colour in zip(objects, colours, strict=True):
        if one.mask is not None:
            canvas = _with_mask(canvas, one, colour, width)
    boxes = torch.stack([one.box * factors.repeat(2) for one in objects])
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:].maximum(boxes[:, :2])], 1)
    canvas = draw_bounding_boxes(canvas, boxes, colors=list(colours), width=width)
    for one, colour in zip(objects, colours, strict=True):
        if one.keypoints is not None:
            points = one.keypoints[None, :, :2] * factors
            shown = None if one.score is not None else one.keypoints[None, :, 2] > 0
            canvas = draw_keypoints(canvas, points, colors=colour, radius=width + 1, visibility=shown)
    picture = _as_image(canvas)
    _write_names(picture, objects, boxes.tolist(), colours)
    return picture


def _as_image(canvas: Tensor) -> Image.Image:
    picture: Image.Image = TF.to_pil_image(canvas)
    return picture


def _colour(one: SeenObject) -> Colour:
    return GREEN if one.score is None else colour_of(one.label)


def _with_mask(canvas: Tensor, one: SeenObject, colour: Colour, width: int) -> Tensor:
    """In colour; of a true object the outline alone."""
    assert one.mask is not None
    mask = F.interpolate(one.mask[None, None].float(), tuple(canvas.shape[1:]), mode="bilinear")[0] > 0.5
    outline = mask & ~(-F.max_pool2d(-mask.float(), 2 * width + 1, 1, width)).bool()
    filled = canvas if one.score is None else draw_segmentation_masks(canvas, mask, alpha=0.4, colors=colour)
    drawn: Tensor = draw_segmentation_masks(filled, outline, alpha=1.0, colors=colour)
    return drawn


def _write_names(
    picture: Image.Image, objects: Sequence[SeenObject], boxes: list[Place], colours: Sequence[Colour]
) -> None:
    """Class and score beside each box; the names of the least sure objects are left out where no place is free."""
    pen, font = ImageDraw.Draw(picture), font_of(max(13, max(picture.size) // 45))
    taken: list[Place] = []
    for one, box, colour in zip(objects, boxes, colours, strict=True):
        text = one.name if one.score is None else f"{one.name} {one.score:.2f}"
        left, top, right, bottom = pen.textbbox((0, 0), text, font)
        size = right - left + 6, bottom - top + 6
        place = next((p for p in _places(box, size, picture.size) if not any(_meet(p, other) for other in taken)), None)
        if place is None:
            continue
        taken.append(place)
        pen.rectangle(place, colour)
        pen.text((place[0] + 3 - left, place[1] + 3 - top), text, text_colour_on(colour), font)


def _places(box: Place, size: tuple[float, float], whole: tuple[int, int]) -> Iterator[Place]:
    """Above the box, in it if it is large, below it, beside it; then further and further down."""
    (left, top, right, bottom), (width, height) = box, size
    roomy = bottom - top > 4 * height and right - left > 1.5 * width
    inside = [(left, top), (left, bottom - height)] if roomy else []
    around = [
        (left, bottom),
        (right - width, top - height),
        (right, top),
        (left - width, top),
        (right, bottom - height),
    ]
    further = [(left, top + step * height) for step in range(1, 8)]
    for x, y in [(left, top - height), *inside, *around, *further]:
        x, y = max(0.0, min(x, whole[0] - width - 1)), max(0.0, min(y, whole[1] - height - 1))
        yield x, y, x + width, y + height


def _meet(first: Place, second: Place) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]
