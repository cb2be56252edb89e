"""Which training images each client has."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pws._errors import PwsError

Shares = list[list[int]]
"""The image numbers of each client, in order."""


def partition(labels: Tensor, clients: int, alpha: float | None, least: int, seed: int) -> Shares:
    """Divide images among clients: each image to one of them, and at least `least` to each.

    With `alpha`, client k of K gets of class c the share `p_ck` of its images, in random order, where

        (p_c1, ..., p_cK) ~ Dirichlet(alpha, ..., alpha)

    (Hsu et al. 2019). A client left with fewer than `least` images gets some, drawn at random, of whoever has most. Without
    `alpha` all images are divided at random in equal parts.

    Raises:
        PwsError: there are too few images for all clients.
    """
    if clients * least > len(labels):
        raise PwsError(
            f"each client needs a batch of images: {clients:,} clients (federated.clients) times {least} (data.batch_size) are "
            f"{clients * least:,}, and there are {len(labels):,} training images. Take fewer clients or a smaller batch."
        )
    rng = np.random.default_rng(seed)
    if alpha is None:
        return [sorted(part.tolist()) for part in np.array_split(rng.permutation(len(labels)), clients)]
    parts: Shares = [[] for _ in range(clients)]
    for label in np.unique(labels.numpy()):
        images = rng.permutation(np.flatnonzero(labels.numpy() == label))
        for part, drawn in zip(parts, _divided(images, rng.dirichlet([alpha] * clients)), strict=True):
            part.extend(drawn.tolist())
    _fill(parts, least, rng)
    return [sorted(part) for part in parts]


def _divided(images: NDArray[np.int64], shares: NDArray[np.float64]) -> list[NDArray[np.int64]]:
    """Cut into parts as large as these shares say."""
    ends = np.rint(np.cumsum(shares)[:-1] * len(images)).astype(int)
    return np.split(images, ends)


def _fill(parts: Shares, least: int, rng: np.random.Generator) -> None:
    """Give each client `least` images, from those who have most."""
    for part in parts:
        while len(part) < least:
            largest = max(parts, key=len)
            part.append(largest.pop(int(rng.integers(len(largest)))))
