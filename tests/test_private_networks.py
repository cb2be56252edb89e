"""The networks of private recipes: Opacus gets the gradients that autograd has for one image after the other."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

import pytest
import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor
from torch.nn import functional as F

from pws.methods import build_method
from pws.models import build_model

METHODS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("none", "gn", "ws", "nf", "pws-paper")},
    "pws, layers": {"form": "layers"},
    "pws, optimizer": {"form": "optimizer"},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("network", ["stack4", "wrn16-4", "resnet18"])
def test_gradients_per_sample_of_a_recipes_network(network: str, method: str) -> None:
    import_module("pws.private")  # makes its samplers known
    torch.manual_seed(0)
    built = build_method(method.split(",")[0], **METHODS[method])
    model = build_model(network, built, width=0.125, in_channels=1, num_classes=3)
    model = model.double().to(memory_format=torch.channels_last)  # as in training
    images = torch.randn(2, 1, 16, 16, dtype=torch.float64).to(memory_format=torch.channels_last)
    labels, parameters = torch.tensor([0, 2]), list(model.parameters())
    alone = [torch.autograd.grad(loss(model, images[i : i + 1], labels[i : i + 1]), parameters) for i in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        GradSampleHooks(model)
        loss(model, images, labels).backward()
    for parameter, gradients in zip(parameters, zip(*alone, strict=True), strict=True):
        wanted = torch.stack(gradients)
        scale = 1e-12 + float(wanted.abs().max())
        assert float((parameter.grad_sample - wanted).abs().max()) < 1e-8 * scale  # type: ignore[attr-defined]


def loss(model: torch.nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The mean over the images."""
    return F.cross_entropy(model(images), labels)
