"""Images in array files: idx, as MNIST's and Fashion-MNIST's, and npz, as MedMNIST's."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from pws.errors import PwsError


def read_idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The uint8 tensor in an idx file: magic number, sizes (big-endian 32-bit each), bytes."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise PwsError(f"{path} is corrupt ({error}). Delete it and get it again.") from error
    dims = 1 + len(shape)
    sizes = [int.from_bytes(raw[4 * d : 4 * d + 4], "big") for d in range(1, 1 + dims)]
    header = 4 * (1 + dims)
    if raw[:4] != bytes([0, 0, 8, dims]) or tuple(sizes[1:]) != shape or len(raw) != header + _product(sizes):
        raise PwsError(
            f"{path} is not an idx file of bytes shaped (count{''.join(f', {s}' for s in shape)}): its header says "
            f"{sizes} and it holds {len(raw)} bytes. It is cut off or another file: delete it and get it again."
        )
    return torch.frombuffer(bytearray(raw[header:]), dtype=torch.uint8).view(sizes)


def _product(sizes: list[int]) -> int:
    return int(torch.tensor(sizes).prod())


def read_npz(path: Path) -> list[tuple[Tensor, Tensor]]:
    """Images `(N, C, H, W)`, uint8 or float32, and labels `(N,)` of the training and the test part."""
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: torch.from_numpy(file[key]) for key in keys}
    except (OSError, KeyError, ValueError, TypeError, EOFError, IndexError, AttributeError, BadZipFile) as error:
        raise PwsError(
            f"npz: cannot read {path} ({error}). --data.root names a file in MedMNIST's layout: an .npz with the arrays "
            f"{', '.join(keys)}; images (N, H, W) or (N, H, W, C), labels (N,) of whole numbers."
        ) from error
    parts = [_npz_part(path, part, arrays) for part in ("train", "test")]
    train, test = (tuple(images.shape[1:]) for images, _ in parts)
    if train != test:
        raise PwsError(
            f"npz: the images of {path} must be of one shape; got {train} for training and {test} for testing."
        )
    return parts


def _npz_part(path: Path, part: str, arrays: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"].flatten().long()
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
