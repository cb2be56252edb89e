"""`python -m benchmarks private`: what it says of single images is what autograd says of each alone."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import pws
from benchmarks.theory.private import image_share, kernels_of


def test_the_share_is_that_of_each_image_alone() -> None:
    model = nn.Sequential(
        *(pws.mark(nn.Conv2d(2, 6, 3)), nn.ReLU(), pws.mark(nn.Conv2d(6, 4, 3, padding=1)), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(144, 3)),
    ).to(memory_format=torch.channels_last)  # as the networks and images of the benchmark
    images, labels = torch.randn(5, 2, 8, 8).to(memory_format=torch.channels_last), torch.tensor([0, 1, 2, 0, 1])
    shares = []
    for image, label in zip(images, labels, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        filters = [g.flatten(1) for g in torch.autograd.grad(loss, kernels_of(model))]
        average = sum(float(g.mean(1).square().sum()) * g.shape[1] for g in filters)
        shares.append(average / sum(float(g.square().sum()) for g in filters))
    assert abs(image_share(model, images, labels) - sum(shares) / 5) < 1e-5
