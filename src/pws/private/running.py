"""Running a model on the images."""

from __future__ import annotations

from typing import Any

from torch import nn

from pws._batch import REJECTIONS, Forward, example_of
from pws.surgery.trace import rejected


def run_on(model: nn.Module, images: Any, forward: Forward | None) -> None:
    """Run it, for its hooks.

    Raises:
        PwsError: it can't be run on them.
    """
    try:
        example_of(model, images, forward).outputs(model)
    except REJECTIONS as error:
        raise rejected(model, error) from error
