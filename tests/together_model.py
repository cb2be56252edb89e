"""A network for tests of `standardize_together`, and what it computes."""

from __future__ import annotations

import torch
from backends import device_of
from torch import Tensor, nn

import pws


class Widen(nn.Module):
    """`features` features, by repetition."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, input: Tensor) -> Tensor:
        return input.repeat(1, -(-self.features // input.shape[1]))[:, : self.features]


def model_of(backend: str) -> nn.Sequential:
    """Few filters, for the interpreter takes a millisecond for each, with fan-ins for every path of the kernels: 9, 27 and 147
    unaligned and 8 aligned in the smallest block, 304 in the middle one, 1030 unaligned and 2056 aligned in several; a layer
    without a bias, a transposed one, one that is used twice."""
    twice = pws.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
    model = nn.Sequential(
        pws.Conv2d(3, 4, 7, padding=3),
        *(nn.ReLU(), twice, nn.ReLU(), twice, nn.ReLU(), pws.ConvTranspose2d(4, 3, 3), pws.Conv2d(3, 8, 3, stride=3)),
        *(pws.Conv2d(8, 4, 1), nn.Flatten(1)),
        *(Widen(304), pws.Linear(304, 3, gain="linear"), Widen(1030), pws.Linear(1030, 4, gamma=0.1)),
        *(Widen(2056), pws.Linear(2056, 2, relative_gamma=True)),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(device_of(backend))


def results(model: nn.Module, images: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The output and all gradients."""
    model.zero_grad()
    with torch.autocast(images.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        output = model(images)
    torch.autograd.backward(output.float().square().sum())
    return [output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same(mine: list[Tensor], alone: list[Tensor], closeness: float = 1e-4) -> None:
    assert len(mine) == len(alone)
    for a, b in zip(mine, alone, strict=True):
        assert (a - b).abs().max() <= closeness * b.abs().max()
