"""Masks as COCO writes them: polygons, or run lengths (RLE) as a list or compressed into a string."""

from __future__ import annotations

from typing import Any

import faster_coco_eval.core.mask as coco_mask
import numpy as np
import torch
from torch import Tensor

from pws._errors import one_line, shown
from pws.training.detect.faults import ROUNDING, FaultError, is_number

Shape = list[np.ndarray[Any, np.dtype[np.float64]]] | dict[str, Any]
"""Polygons, x and y in turn; or compressed RLE with its size."""


def checked_shape(segmentation: Any, height: int, width: int) -> Shape:
    """What `mask_of` decodes.

    Raises:
        FaultError: it is empty or malformed, or of another size than the image.
    """
    if not segmentation:
        raise FaultError(
            "has no segmentation, others of this file have: each object needs one, or none. Mend or remove it."
        )
    if isinstance(segmentation, dict):
        return _checked_rle(segmentation, height, width)
    if isinstance(segmentation, list):
        return [_checked_polygon(polygon, height, width) for polygon in segmentation]
    raise FaultError(f"has the segmentation {shown(segmentation)}; it must be a list of polygons or an RLE.")


def mask_of(shape: Shape, height: int, width: int) -> Tensor:
    """The mask `(H, W)` uint8."""
    rle = coco_mask.merge(coco_mask.frPyObjects(shape, height, width)) if isinstance(shape, list) else shape
    return torch.from_numpy(np.ascontiguousarray(coco_mask.decode(rle)))


def _checked_polygon(polygon: Any, height: int, width: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    if not isinstance(polygon, list) or not all(map(is_number, polygon)) or len(polygon) % 2 or len(polygon) < 6:
        raise FaultError(f"has the polygon {shown(polygon)}; it needs x and y of three points or more, all finite.")
    points = np.array(polygon, np.float64)
    beyond = max(-points.min(), points[::2].max() - width, points[1::2].max() - height)
    if beyond > ROUNDING:
        raise FaultError(
            f"has a polygon that leaves its image of {width} x {height} pixels by {beyond:g}. Is it of another image, or was "
            "the image resized? Mend or remove it."
        )
    return points


def _checked_rle(rle: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    size, counts = rle.get("size"), rle.get("counts")
    if size != [height, width]:
        raise FaultError(
            f"has an RLE of size {shown(size)}, its image is [{height}, {width}] (height, width). Mend or remove it."
        )
    try:
        if isinstance(counts, list):
            rle = coco_mask.frPyObjects({"size": size, "counts": counts}, height, width)
        elif not isinstance(counts, str):
            raise ValueError(f"counts must be a list or a string, got {shown(counts)}")
        found = int(coco_mask.decode({"size": size, "counts": rle["counts"]}).sum())
    except (ValueError, RuntimeError, TypeError) as error:
        raise FaultError(f"has a malformed RLE ({one_line(error, 120)}). Mend or remove it.") from error
    if not found:
        raise FaultError("has an RLE that covers no pixel. Mend or remove it.")
    return {"size": size, "counts": rle["counts"]}
