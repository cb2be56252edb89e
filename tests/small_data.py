"""Small data files that the tests make."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_npz(path: Path, *, channels: int = 1, side: int = 16, count: int = 20, classes: int = 10) -> None:
    """Random bytes in MedMNIST's layout, every class in both parts."""
    rng = np.random.default_rng(0)
    shape = (count, side, side) if channels == 1 else (count, side, side, channels)
    images = {f"{part}_images": rng.integers(0, 256, shape, dtype=np.uint8) for part in ("train", "test")}
    labels = {f"{part}_labels": np.arange(count)[:, None] % classes for part in ("train", "test")}
    np.savez(path, **images, **labels)


def write_folder(root: Path, *, classes: int, images: int, side: int) -> None:
    """Random PNG images in root/train/CLASS and root/val/CLASS, of unequal sides."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in range(classes):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(images):
                pixels = rng.integers(0, 256, (side + number, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
