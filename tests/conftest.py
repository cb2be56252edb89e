"""What every test shares: a fixed seed and one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from backends import HERE, device_of
from torch import Tensor

from pws import kernels


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # Tensors are tiny here; on a busy machine two threads that wait for each other take up to 50 times as long.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=HERE)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.use(request.param):
        yield request.param


@pytest.fixture
def images(backend: str) -> Tensor:
    return torch.randn(2, 3, 7, 7, device=device_of(backend))
