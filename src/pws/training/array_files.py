"""Images in array files: idx, as MNIST's and Fashion-MNIST's, and npz, as MedMNIST's."""

from __future__ import annotations

import gzip
import zlib
from math import prod
from pathlib import Path
from typing import Final
from zipfile import ZipFile

import numpy as np
import torch
from torch import Tensor

from pws._errors import PwsError, one_line, shown
from pws.training.memory import check_memory

UNFOLDED: Final = 2
"""Bytes that reading takes at least for each that a file holds: the array, and the images in torch's order."""


def read_idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The uint8 tensor in an idx file: magic number, sizes (big-endian 32-bit each), bytes."""
    dims = 1 + len(shape)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4 * (1 + dims))
            sizes = [int.from_bytes(head[4 * d : 4 * d + 4], "big") for d in range(1, 1 + dims)]
            check_memory(prod(sizes), f"{path} says that it")
            body = file.read(prod(sizes) + 1)  # no more than it says, whatever a compressed file unfolds to
    except (OSError, EOFError, zlib.error) as error:
        raise PwsError(f"{path} is corrupt ({error}). Delete it and get it again.") from error
    if head[:4] != bytes([0, 0, 8, dims]) or tuple(sizes[1:]) != shape or len(body) != prod(sizes) or not sizes[0]:
        raise PwsError(
            f"{path} is not an idx file of bytes shaped (count{''.join(f', {s}' for s in shape)}): its header says "
            f"{sizes}, and {len(body):,} bytes could be read. It is cut off or another file: delete it and get it again."
        )
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).view(sizes)


def read_npz(path: Path) -> list[tuple[Tensor, Tensor]]:
    """Images `(N, C, H, W)`, uint8 or float32, and labels `(N,)` of the training, the test and perhaps the validation part."""
    keys = ["train_images", "train_labels", "test_images", "test_labels"]
    try:
        with np.load(path, allow_pickle=False) as file:
            validates = {"val_images", "val_labels"} <= set(file.files)
            keys += ["val_images", "val_labels"] * validates
            check_memory(UNFOLDED * sum(_declared_bytes(path, key) for key in keys), f"npz: {path} says that it")
            arrays = {key: torch.from_numpy(file[key]) for key in keys}
    except (MemoryError, PwsError):
        raise
    except Exception as error:  # a file may hold anything, and each of numpy, zipfile and zlib has errors of its own
        raise PwsError(
            f"npz: cannot read {path} ({one_line(error)}). --data.root names a file in MedMNIST's layout: an .npz with the "
            f"arrays {', '.join(keys)}; images (N, H, W) or (N, H, W, C), labels (N,) of whole numbers."
        ) from error
    parts = [_npz_part(path, part, arrays) for part in ("train", "test", *["val"] * validates)]
    largest, count = max(int(labels.max()) for _, labels in parts), sum(len(labels) for _, labels in parts)
    if largest >= count:
        raise PwsError(
            f"npz: the labels in {path} number the classes from 0 on; the largest is {largest:,}, for {count:,} images: a "
            "network of as many outputs would be built. Number the classes without gaps."
        )
    train, *others = (tuple(images.shape[1:]) for images, _ in parts)
    for shape, use in zip(others, ("testing", "validation"), strict=False):
        if shape != train:
            raise PwsError(
                f"npz: the images of {path} must be of one shape; got {train} for training and {shape} for {use}."
            )
    return parts


def _declared_bytes(path: Path, key: str) -> int:
    """What the array's header says that it takes."""
    with ZipFile(path) as file, file.open(f"{key}.npy") as member:
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read[np.lib.format.read_magic(member)](member)
    return prod(shape) * int(dtype.itemsize)


def _labels(path: Path, given: Tensor) -> Tensor:
    labels = given.flatten().long()
    if given.is_complex() or not torch.equal(labels.to(given.dtype), given.flatten()):
        raise PwsError(
            f"npz: the labels in {path} must be whole numbers; got {given.dtype}: {shown(given[:5].tolist())}."
        )
    return labels


def _npz_part(path: Path, part: str, arrays: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    images, labels = arrays[f"{part}_images"], _labels(path, arrays[f"{part}_labels"])
    if images.is_complex():
        raise PwsError(f"npz: {path} needs real {part}_images; got {images.dtype}.")
    if images.dim() == 3:
        images = images[..., None]
    if images.dim() != 4 or len(images) != len(labels) or not len(images) or labels.min() < 0:
        raise PwsError(
            f"npz: {path} needs {part}_images (N, H, W) or (N, H, W, C) and as many labels, from 0 on; got images "
            f"{tuple(images.shape)}, {len(labels)} labels."
        )
    images = images.permute(0, 3, 1, 2).contiguous()
    images = images if images.dtype == torch.uint8 else images.float()
    bad = (~torch.isfinite(images).flatten(1).all(1)).nonzero().flatten()
    if len(bad):
        raise PwsError(
            f"npz: {len(bad)} of {len(images)} {part}_images in {path} hold NaN or infinity, the first is number "
            f"{int(bad[0])}. No network can train on them: mend or remove them."
        )
    return images, labels
