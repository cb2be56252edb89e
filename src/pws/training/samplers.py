"""The order of a run's images: which of them are in which batch of which process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

Key = tuple[int, list[int]]
"""Epoch and image numbers of a batch."""


class EpochSampler(Sampler[Key]):
    """Batches that depend on the epoch, from a batch of it on."""

    epoch = first_batch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        if epoch != self.epoch:
            self.epoch, self.first_batch = epoch, 0

    def start_at(self, epoch: int, batch: int) -> None:
        """Leave out this epoch's first batches, which were trained before a resume."""
        self.epoch, self.first_batch = epoch, batch


class TrainSampler(EpochSampler):
    """Each epoch's batches for one process: an order drawn from seed and epoch, cut into batches, cut into parts.

    A step's batch is shared out: process r of R takes every R-th of its images from r on, in `accumulate` equal parts.
    Images that do not fill a last batch are left out for this epoch. With `groups`, the group of each image, a batch holds
    images of one group as long as there are enough of them: the last ones of each group are put together. With `repeats`,
    a step has as many copies of each image, shared out like images, and an epoch as many fewer images. `order` draws an
    epoch's order in place of any order.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        seed: int,
        rank: int,
        world: int,
        accumulate: int,
        groups: Sequence[int] | None = None,
        repeats: int = 1,
        order: Callable[[torch.Generator], Tensor] | None = None,
    ) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.groups, self.repeats, self.order = groups, repeats, order

    def __len__(self) -> int:
        return self.count // self.batch_size * self.accumulate

    def __iter__(self) -> Iterator[Key]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.count, generator=generator) if self.order is None else self.order(generator)
        order = (order[:, None] + self.count * torch.arange(self.repeats)).flatten()[: self.count]
        if self.groups is not None:
            order = torch.tensor(_grouped(order.tolist(), self.groups, self.batch_size))
        for start in range(0, self.count - self.batch_size + 1, self.batch_size)[self.first_batch // self.accumulate :]:
            own = order[start + self.rank : start + self.batch_size : self.world]
            # First copies first: mixup mixes neighbours, which should be different images.
            own = own[(own // self.count).argsort(stable=True)]
            for part in own.chunk(self.accumulate):
                yield self.epoch, part.tolist()


def _grouped(order: list[int], groups: Sequence[int], batch_size: int) -> list[int]:
    """The same images: whole batches of one group as they fill up, then the rest."""
    waiting: dict[int, list[int]] = {}
    result: list[int] = []
    for number in order:
        batch = waiting.setdefault(groups[number], [])
        batch.append(number)
        if len(batch) == batch_size:
            result += batch
            batch.clear()
    return result + [number for group in sorted(waiting) for number in waiting[group]]


class PoissonSampler(EpochSampler):
    """Each epoch's batches of a private run: every image is in each batch with the same probability, whatever else is in it.

    That is what an accountant of differential privacy assumes. Batches differ in size, and may be empty. An epoch has
    `ceil(count / batch_size)` of them, and the probability is one over that. With `repeats` an image's copies stand beside each
    other: image `n` is `n`, `count + n`, `2 * count + n` ...
    """

    def __init__(self, count: int, batch_size: int, *, seed: int, repeats: int) -> None:
        self.count, self.seed, self.repeats = count, seed, repeats
        self.steps = -(-count // batch_size)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Key]:
        # Negative, as no step's own seed is: the noise must not come from the same numbers.
        generator = torch.Generator().manual_seed(-1 - (self.seed * 1_000_003 + self.epoch))
        for batch in range(self.steps):
            chosen = (torch.rand(self.count, generator=generator) * self.steps < 1).nonzero().flatten()
            if batch >= self.first_batch:
                yield self.epoch, (chosen[:, None] + self.count * torch.arange(self.repeats)).flatten().tolist()


class TestSampler(Sampler[Key]):
    """All images once; process r of R takes every R-th image from r on, in order."""

    __test__ = False  # the name is not a pytest class

    def __init__(self, count: int, batch_size: int, *, rank: int, world: int) -> None:
        own = range(rank, count, world)
        self.batches = [list(own[start : start + batch_size]) for start in range(0, len(own), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Key]:
        for batch in self.batches:
            yield 0, batch
