"""The step of a row in a case: built where it is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.speed.detectors import detector, loss_of, scenes
from benchmarks.speed.networks import kernels_of, network, optimizer_of
from benchmarks.speed.suite import Case
from pws.bench.timers import TimedStep
from pws.models.detectors import DETECTORS
from pws.surgery import fold

CLASSES: Final = 1000
Work = tuple[nn.Module, tuple[Any, ...], Callable[[Any], Tensor]]
"""A model, what its training pass takes, and the loss of what that returns."""


def build_step(case: Case, row: str) -> TimedStep:
    """The training step or the forward pass of a row."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, batch, loss_in = (_detection if case.model in DETECTORS else _classification)(case, row, device)
    precision = torch.autocast(device.type, torch.bfloat16, enabled=case.autocast)
    if case.task == "inference":
        model = fold(model).eval()
        run: Any = torch.compile(model) if case.compile else model

        def infer() -> None:
            with torch.inference_mode(), precision:
                run(batch[0])

        return TimedStep(infer, model)
    optimizer = optimizer_of(row, model, fused=case.optimizer == "sgd-fused")
    run = torch.compile(model) if case.compile else model

    def train() -> None:
        optimizer.zero_grad()
        with kernels_of(row):
            with precision:
                loss = loss_in(run(*batch))
            torch.autograd.backward(loss)
            optimizer.step()

    return TimedStep(train, model)


def _classification(case: Case, row: str, device: torch.device) -> Work:
    model = network(case.model, row, case.width).to(device)
    images = torch.randn(case.batch, 3, case.pixels, case.pixels, device=device)
    labels = torch.randint(CLASSES, (case.batch,), device=device)
    if case.channels_last:
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    return model, (images,), lambda logits: F.cross_entropy(logits, labels)


def _detection(case: Case, row: str, device: torch.device) -> Work:
    return (
        detector(case.model, row, case.width, case.pixels).to(device),
        scenes(case.pixels, case.batch, device),
        loss_of,
    )
