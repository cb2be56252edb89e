"""Small private runs: of a recipe, and of points by a network of two layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from pws.training import DataConfig, OptimConfig, PrivacyConfig, Recipe, TrainerConfig, load_recipe

TINY = (
    *(
        "--data.name=digits",
        "--data.image_size=12",
        "--data.train_images=128",
        "--data.batch_size=32",
        "--data.validation=0",
    ),
    *("--model.width=0.08", "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.epochs=2"),
    *("--optim.lr=0.3", "--optim.momentum=0.5", "--optim.schedule=constant", "--data.augment=false"),
)
NOISY = ("--privacy.noise=1.0", "--privacy.delta=0.001")


def tiny(*flags: str) -> Recipe:
    return load_recipe("fashion-mnist-allconv-pws", *TINY, *flags)


class Points(Dataset[Any]):
    """Points of four numbers in three classes, with a copy's shift drawn from torch's generator if wanted."""

    def __init__(self, count: int, *, shifted: bool = False) -> None:
        generator = torch.Generator().manual_seed(7)
        self.inputs = torch.randn(count, 4, generator=generator, dtype=torch.float64)
        self.labels = torch.randint(3, (count,), generator=generator)
        self.shifted = shifted

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        shift = torch.randn(4, dtype=torch.float64) if self.shifted else 0.0
        return self.inputs[number] + shift, int(self.labels[number])


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def settings(**privacy: Any) -> Recipe:
    return Recipe(
        data=DataConfig(batch_size=8, validation=0.0, augment=True),  # the points draw their own
        optim=OptimConfig(lr=0.5, momentum=0.0, weight_decay=0.0, schedule="constant"),
        trainer=TrainerConfig(accelerator="cpu", devices=1, precision="64-true", epochs=2),
        privacy=PrivacyConfig(noise=0.0, delta=1e-3, **privacy),
    )
