"""The data of a run: batches that depend on the seed, the epoch and the image alone.

A batch is asked for by epoch and image numbers, and each image's augmentation is seeded by (seed, epoch, image). So the
same images come in the same shape whatever the number of processes, of loader workers, or of restarts. Mixup and cutmix are
seeded by the batch's first image, and mix what one process computes at a time: their results depend on how a step is divided.

With repeated augmentation `count + n` is image `n` once more, `2 * count + n` the time after: each with a seed of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pws._errors import PwsError
from pws.training.augmentation import Erase, Mix, erasing, mixing
from pws.training.datasets import load_splits
from pws.training.images import Images, Splits
from pws.training.recipe import DataConfig
from pws.training.samplers import EpochSampler, Key, PoissonSampler, TestSampler, TrainSampler


@contextmanager
def seeded(seed: int, epoch: int, number: int) -> Iterator[None]:
    """Random numbers of torch that are those of this image in this epoch; then they go on as before."""
    before = torch.get_rng_state()
    # torch.manual_seed would reseed every GPU's generator too.
    torch.default_generator.manual_seed(((seed * 1_000_003 + epoch) * 1_000_000_007 + number) % 2**63)
    try:
        yield
    finally:
        torch.set_rng_state(before)


class ImageBatches(Dataset[tuple[Tensor, Tensor]]):
    """Normalized batches `(N, C, H, W)` float32 and labels, by epoch and image numbers.

    Labels are int64 `(N,)`, or float32 `(N, classes)` where `mix` makes them shares.
    """

    def __init__(
        self, images: Images, splits: Splits, seed: int, erase: Erase | None = None, mix: Mix | None = None
    ) -> None:
        self.images, self.seed, self.erase, self.mix = images, seed, erase, mix
        self.mean = torch.tensor(splits.mean)[:, None, None]
        self.std = torch.tensor(splits.std)[:, None, None]

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor]:
        epoch, numbers = key
        if self.images.augment is None and self.erase is None:
            pixels, labels = self.images.get(numbers)
            inputs = self.normalized(pixels)
        else:
            parts = [self._augmented(epoch, number) for number in numbers]
            inputs, labels = torch.cat([image for image, _ in parts]), torch.cat([label for _, label in parts])
        if self.mix is not None:
            with seeded(self.seed, epoch, -1 - numbers[0]):  # no image has a negative number
                inputs, labels = self.mix(inputs, labels)
        return inputs.contiguous(memory_format=torch.channels_last), labels

    def normalized(self, pixels: Tensor) -> Tensor:
        """What the network takes in place of these pixels; bytes count as 0 to 1."""
        return normalized(pixels, self.mean, self.std)

    def _augmented(self, epoch: int, number: int) -> tuple[Tensor, Tensor]:
        with seeded(self.seed, epoch, number):
            pixels, label = self.images.get([number % len(self.images)])
            image = self.normalized(pixels if self.images.augment is None else self.images.augment(pixels))
            return image if self.erase is None else self.erase(image), label


def normalized(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pixels `(N, C, H, W)` with the mean and deviation of each channel, `(C, 1, 1)`, taken out; bytes count as 0 to 1."""
    scaled = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
    return ((scaled - mean) / std).contiguous(memory_format=torch.channels_last)


def check_shares(count: int, batch_size: int, world: int, accumulate: int) -> None:
    """Raise `PwsError` unless batches can be filled and shared out equally."""
    if batch_size < 1 or accumulate < 1 or batch_size % (world * accumulate):
        raise PwsError(
            "data.batch_size counts the images of a step over all processes and accumulated parts, and must be divisible "
            f"by their product; got {batch_size} for {world} processes and trainer.accumulate={accumulate}."
        )
    if batch_size > count:
        raise PwsError(f"data.batch_size must be at most the number of training images, {count}; got {batch_size}.")


@dataclass
class Shares:
    """How the work is divided among processes."""

    rank: int = 0
    world: int = 1
    accumulate: int = 1


class Parts(Protocol):
    """A dataset's parts, and the names of its classes."""

    @property
    def train(self) -> Sized:
        """What is trained on."""

    @property
    def validation(self) -> Sized | None:
        """What tells the best epoch."""

    @property
    def test(self) -> Sized:
        """What the result is taken on."""

    @property
    def classes(self) -> list[str]:
        """Their names, in the order of the labels."""


def check_tested(splits: Parts, world: int) -> None:
    """Raise `PwsError` unless each process has a validation and a test image."""
    for name, part in (("validation", splits.validation), ("test", splits.test)):
        if part is not None and len(part) < world:
            raise PwsError(
                f"each process needs a {name} image at least; there are {len(part)} for {world} processes. "
                + (
                    "Hold out more, or none, with --data.validation."
                    if part is splits.validation
                    else "Use fewer processes."
                )
            )


class PerhapsEmpty(Dataset[Any]):
    """Batches of pairs of tensors, of which one may have no image."""

    def __init__(self, batches: Dataset[Any]) -> None:
        self.batches = batches

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor]:
        epoch, numbers = key
        inputs, labels = self.batches[epoch, numbers or [0]]
        return (inputs, labels) if numbers else (inputs[:0], labels[:0])


class RecipeData(LightningDataModule, ABC):
    """The loaders of a recipe's data."""

    splits: Parts

    def __init__(self, config: DataConfig, seed: int) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        self.first_epoch = self.first_batch = 0
        """Where a resumed run goes on: Lightning draws the first batches before it tells the sampler the epoch."""

    copies: int | None = None
    """(private) Copies of each image; batches are then drawn as the accountants of privacy assume."""

    @abstractmethod
    def batches(self, images: Any, *, train: bool) -> Dataset[Any]:
        """Batches by `Key` of one part of the data."""

    def groups(self) -> Sequence[int] | None:
        """The group of each training image, where batches hold images of one group."""
        return None

    def order(self) -> Callable[[torch.Generator], Tensor] | None:
        """What draws an epoch's order of the training images, where not any will do."""
        return None

    def _loader(self, batches: Dataset[Any], sampler: Sampler[Key]) -> DataLoader[Any]:
        workers = self.config.workers
        return DataLoader(
            batches,
            batch_size=None,  # the sampler yields whole batches
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def shares(self) -> Shares:
        """This process's part of the work, from the trainer it is attached to."""
        trainer = self.trainer
        if trainer is None:
            return Shares()
        return Shares(trainer.global_rank, trainer.world_size, trainer.accumulate_grad_batches)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled, augmented if the recipe says so."""
        batches, sampler = self.batches(self.splits.train, train=True), self.train_sampler()
        sampler.start_at(self.first_epoch, self.first_batch)
        return self._loader(batches if self.copies is None else PerhapsEmpty(batches), sampler)

    def train_sampler(self) -> EpochSampler:
        """What draws the training batches."""
        shares, sizes = self.shares(), (len(self.splits.train), self.config.batch_size)
        if self.copies is not None:
            return PoissonSampler(*sizes, seed=self.seed, repeats=self.copies)
        return TrainSampler(
            *sizes,
            seed=self.seed,
            rank=shares.rank,
            world=shares.world,
            accumulate=shares.accumulate,
            groups=self.groups(),
            repeats=self.config.ra_reps,
            order=self.order(),
        )

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The validation images, in order; no loader if there are none."""
        return [] if self.splits.validation is None else self._in_order(self.splits.validation)

    def test_dataloader(self) -> DataLoader[Any]:
        """The test images, in order."""
        return self._in_order(self.splits.test)

    def _in_order(self, images: Sized) -> DataLoader[Any]:
        shares = self.shares()
        sampler = TestSampler(len(images), self.test_batch_size(), rank=shares.rank, world=shares.world)
        return self._loader(self.batches(images, train=False), sampler)

    def test_batch_size(self) -> int:
        """Images of a batch without gradients."""
        return max(1, min(500, self.config.batch_size * 4))


class ImageData(RecipeData):
    """Images with a label each."""

    splits: Splits

    def __init__(self, config: DataConfig, seed: int, splits: Splits | None = None) -> None:
        super().__init__(config, seed)
        self.splits = splits or load_splits(config, seed)

    def batches(self, images: Images, *, train: bool) -> ImageBatches:
        """Normalized images and labels; training images are augmented as the recipe says."""
        if not train:
            return ImageBatches(images, self.splits, self.seed)
        shares = self.shares()
        together = self.config.batch_size // (shares.world * shares.accumulate)
        mix = mixing(self.config, len(self.splits.classes), together)
        return ImageBatches(images, self.splits, self.seed, erasing(self.config), mix)

    def order(self) -> Callable[[torch.Generator], Tensor] | None:
        """That of the dataset."""
        return self.splits.order
