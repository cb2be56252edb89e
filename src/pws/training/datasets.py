"""The datasets: where their files are looked for, how they are read, how they are augmented."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torchvision import datasets as tv
from torchvision.transforms import v2

from pws._errors import PwsError, UnknownNameError
from pws.training.array_files import read_idx, read_npz
from pws.training.augmentation import auto_augment, check_pixels
from pws.training.images import (
    Augment,
    FolderImages,
    ReadImages,
    Splits,
    TensorImages,
    center_crop,
    fitted,
    image_folder,
    resized,
)
from pws.training.memory import check_memory
from pws.training.recipe import DataConfig
from pws.training.shards import ImagesIndex
from pws.training.stream import StreamImages, open_packed

DEBIAN_FASHION_MNIST: Final = Path("/usr/share/datasets/fashion-mnist")
DIGIT_CLASSES: Final = [str(digit) for digit in range(10)]
FASHION_PARTS: Final = ("train", "t10k")
FASHION_CLASSES: Final[list[str]] = tv.FashionMNIST.classes
PHOTO_MEAN: Final = (0.485, 0.456, 0.406)
PHOTO_STD: Final = (0.229, 0.224, 0.225)
"""Of ImageNet's channels."""


def load_splits(config: DataConfig, seed: int) -> Splits:
    """The dataset that `config` names.

    Raises:
        UnknownNameError: no such dataset.
        PwsError: files are missing or corrupt, with where they were looked for and how to get them.
    """
    if config.name not in DATASETS:
        raise UnknownNameError("dataset", config.name, DATASETS)
    splits = DATASETS[config.name](config, seed)
    if len(splits.classes) < 2:
        raise PwsError(f"a classifier needs at least two classes; {config.name} in {config.root} has {splits.classes}.")
    return splits


def _digits(config: DataConfig, seed: int) -> Splits:
    return _in_memory(*(config, seed, *digit_arrays(), DIGIT_CLASSES, (0.3053,), (0.3763,)), flip=False)


def digit_arrays() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Pixels `(N, 1, 8, 8)` uint8 and labels of scikit-learn's digits: 1,437 training and 360 test images."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    pixels = torch.tensor(raw.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.tensor(raw.target)
    # Every fifth image is for testing: both parts hold all the writers, in the order of the file.
    test = torch.arange(len(labels)) % 5 == 0
    return (pixels[~test], labels[~test]), (pixels[test], labels[test])


_FASHION_HELP: Final = (
    "Get it with `apt install dataset-fashion-mnist` (Debian, Ubuntu) or --data.download true, "
    "or point --data.root at it."
)


def _fashion_mnist(config: DataConfig, seed: int) -> Splits:
    folders = [Path(config.root), Path(config.root) / "FashionMNIST" / "raw", DEBIAN_FASHION_MNIST]
    if config.download and not (folders[-1] / "train-images-idx3-ubyte.gz").is_file():
        try:
            tv.FashionMNIST(config.root, download=True)
        except (RuntimeError, OSError) as error:
            raise PwsError(f"fashion-mnist: the download to {config.root} failed: {error}. {_FASHION_HELP}") from error
    train, test = (fashion_arrays(part, folders) for part in FASHION_PARTS)
    return _in_memory(*(config, seed, train, test, FASHION_CLASSES, (0.2860,), (0.3530,)), flip=True)


def fashion_arrays(part: str, folders: Sequence[Path], help: str = _FASHION_HELP) -> tuple[Tensor, Tensor]:
    """Pixels `(N, 1, 28, 28)` uint8 and labels of a part of Fashion-MNIST, from the first folder that has its files.

    `help` says how to get them.

    Raises:
        PwsError: the files are missing, corrupt or of different lengths.
    """
    images = read_idx(_find(f"{part}-images-idx3-ubyte", folders, help), (28, 28))[:, None]
    labels = read_idx(_find(f"{part}-labels-idx1-ubyte", folders, help), ()).long()
    if len(images) != len(labels):
        raise PwsError(f"fashion-mnist: {len(images)} {part} images, but {len(labels)} labels: get the files again.")
    return images, labels


def _find(name: str, folders: Sequence[Path], help: str) -> Path:
    for folder in folders:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    looked = ", ".join(str(folder) for folder in folders)
    raise PwsError(f"fashion-mnist: the file {name} (or {name}.gz) is missing; looked in {looked}. {help}")


def _cifar(kind: type[Any], mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[DataConfig, int], Splits]:
    def load(config: DataConfig, seed: int) -> Splits:
        try:
            train, test = (kind(config.root, train=part, download=config.download) for part in (True, False))
        except (RuntimeError, OSError) as error:
            raise PwsError(
                f"{config.name}: {kind.base_folder} is missing or corrupt; looked in {config.root} ({error}). Get it with "
                f"--data.download true, or put the folder of {kind.filename} there."
            ) from error
        pixels = [
            (torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets)) for s in (train, test)
        ]
        return _in_memory(config, seed, pixels[0], pixels[1], train.classes, mean, std, flip=True)

    return load


def _npz(config: DataConfig, seed: int) -> Splits:
    (train, labels), (test, test_labels), *validation = read_npz(Path(config.root))
    scaled = train.double() / 255 if train.dtype == torch.uint8 else train.double()
    count = int(max(part.max() for part in (labels, test_labels, *(own for _, own in validation)))) + 1
    mean, std = scaled.mean((0, 2, 3)).tolist(), scaled.std((0, 2, 3)).clamp(min=1e-6).tolist()
    return _in_memory(
        *(config, seed, (train, labels), (test, test_labels), [str(c) for c in range(count)], mean, std),
        flip=True,
        validation=validation[0] if validation else None,
    )


def _in_memory(
    config: DataConfig,
    seed: int,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: list[str],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    flip: bool,
    validation: tuple[Tensor, Tensor] | None = None,
) -> Splits:
    pixels, labels = train
    chosen, held_out = chosen_images(config, len(labels), seed, own_validation=validation is not None)
    if validation is None and held_out:
        validation = pixels[held_out], labels[held_out]
    if chosen is not None:
        pixels, labels = pixels[chosen], labels[chosen]
    size = (config.image_size, config.image_size) if config.image_size else (pixels.shape[-2], pixels.shape[-1])
    others = [part for part in (test, validation if config.validation else None) if part is not None]
    if size != tuple(pixels.shape[-2:]):
        count = (len(pixels) + sum(len(part[1]) for part in others)) * pixels.shape[1]
        check_memory(5 * count * prod(size), f"data.image_size {size[0]} of {config.name}")  # as floats, then as bytes
    check_pixels(config, pixels)
    augment = small_steps(config, size, flip=flip)
    tested, *validated = (TensorImages(resized(pixels, size), labels) for pixels, labels in others)
    return Splits(
        TensorImages(resized(pixels, size), labels, augment),
        validated[0] if validated else None,
        *(tested, list(classes), mean, std),
    )


def chosen_images(
    config: DataConfig, count: int, seed: int, *, own_validation: bool = False
) -> tuple[list[int] | None, list[int]]:
    """The numbers of the training images that the recipe trains on (None: all), and of those held out; drawn by the seed."""
    share = 0.0 if own_validation else config.validation
    held_out = round(share * (config.train_images or count))
    if not 1 <= (config.train_images or 1) <= count - held_out:
        wanted = f"data.train_images {config.train_images:,}" if config.train_images else "all training images"
        raise PwsError(
            f"{config.name} has {count:,} training images, which must do for {wanted} and, beside them, {held_out:,} for "
            f"data.validation {share:g}. Ask for fewer, or --data.validation 0: the last epoch counts then, not the best."
        )
    if config.train_images is None and not held_out:
        return None, []
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    trained = order[: config.train_images] if config.train_images else sorted(order[: count - held_out])
    return trained, sorted(order[count - held_out :])


def _folder(config: DataConfig, seed: int) -> Splits:
    root, side = Path(config.root), config.image_size or 224
    check_batch(config, side)
    prepare, augment = photo_steps(config, side)
    files = class_folders(root, config.name)
    parts = {name: FolderImages(found, prepare, None, config.max_corrupt) for name, found in files.items()}
    train = FolderImages(files["train"], prepare, augment, config.max_corrupt)
    others = [part for name, part in parts.items() if name != "train"]
    validation, test = _divided(config, seed, train, parts["train"], others)
    return Splits(train, validation, test, files["train"].classes, PHOTO_MEAN, PHOTO_STD)


def class_folders(root: Path, name: str = "folder") -> dict[str, tv.ImageFolder]:
    """The files of root/train/CLASS, root/val/CLASS and, where it is there, root/test/CLASS.

    Raises:
        PwsError: a folder is missing, or they hold other classes.
    """
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise PwsError(
                f"{name}: the folder {root / part} is missing. Put the images into {root}/train/CLASS/... and "
                f"{root}/val/CLASS/..., or point --data.root at the folder that holds train and val."
            )
    files = {part: image_folder(root / part) for part in ("train", "val", "test") if (root / part).is_dir()}
    classes = files["train"].classes
    for part, found in files.items():
        if found.classes != classes:
            odd = sorted(set(classes) ^ set(found.classes))
            raise PwsError(
                f"{name}: train and {part} must hold the same class folders; these stand in one only: {odd}."
            )
    return files


def _stream(config: DataConfig, seed: int) -> Splits:
    packed = open_packed(config.root)
    about, side = packed.about(ImagesIndex), config.image_size or 224
    if about.size is None:
        check_batch(config, side)
        prepare, augment = photo_steps(config, side)
    else:
        size = (config.image_size, config.image_size) if config.image_size else about.size
        prepare = partial(fitted, channels=about.channels, size=size)
        steps = small_steps(config, size, flip=about.flip)
        augment = v2.Compose([partial(resized, size=size), steps]) if steps else None
    parts = {name: StreamImages(packed, name, prepare, None, config.max_corrupt) for name in packed.index.parts}
    train = StreamImages(packed, "train", prepare, augment, config.max_corrupt)
    others = [parts[name] for name in ("val", "test") if name in parts]
    validation, test = _divided(config, seed, train, parts["train"], others)
    return Splits(train, validation, test, about.classes, about.mean, about.std, train.order)


def _divided(
    config: DataConfig, seed: int, train: ReadImages, plain: ReadImages, others: Sequence[ReadImages]
) -> tuple[ReadImages | None, ReadImages]:
    """The images that tell the best epoch and those of the test: `others`, or held-out ones of `plain` and `others`."""
    train.numbers, plain.numbers = chosen_images(config, len(train), seed, own_validation=len(others) > 1)
    found = [plain, *others] if plain.numbers else [*others]
    return found[0] if len(found) > 1 and config.validation else None, found[-1]


def check_batch(config: DataConfig, side: int) -> None:
    """Raise `PwsError` if the memory can't hold a batch of colour images of so many pixels per side."""
    check_memory(
        4 * 3 * config.batch_size * side**2, f"a batch of {config.batch_size:,} images of {side} pixels per side"
    )


def photo_steps(config: DataConfig, side: int) -> tuple[Augment, Augment | None]:
    """What photographs of any size go through without and with augmentation."""
    prepare = center_crop(side)
    moves = [v2.RandomResizedCrop(side), v2.RandomHorizontalFlip()] if config.augment else [prepare]
    steps = [*moves, *auto_augment(config)]
    return prepare, v2.Compose(steps) if steps != [prepare] else None


def small_steps(config: DataConfig, size: tuple[int, int], *, flip: bool) -> Augment | None:
    """The augmentation of small images of one size."""
    crop = v2.RandomCrop(size, padding=[max(1, size[1] // 8), max(1, size[0] // 8)])  # left and right, top and bottom
    moves = [crop, *([v2.RandomHorizontalFlip()] if flip else [])] if config.augment else []
    steps = [*moves, *auto_augment(config)]
    return v2.Compose(steps) if steps else None


DATASETS: Final[dict[str, Callable[[DataConfig, int], Splits]]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar(tv.CIFAR10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _cifar(tv.CIFAR100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": _folder,
    "folder": _folder,
    "npz": _npz,
    "stream": _stream,
}
"""Name to loader."""
