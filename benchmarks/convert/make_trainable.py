"""Trained BatchNorm networks, made trainable by Opacus' fix and by `pws.private.make_trainable`: accuracy right after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from lightning.pytorch import seed_everything
from opacus.grad_sample import GradSampleModule
from opacus.validators import ModuleValidator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import interpolate

from benchmarks.convert.warm_start import LR, QUICK, Trained, accuracy_of, fit_network, network_of
from benchmarks.experiment import PROGRAM, Say, run_experiment
from pws.bench.plotting import new_figure, save_figure
from pws.bench.result_file import Result, write_result
from pws.private import make_trainable
from pws.training.data import ImageBatches, ImageData
from pws.training.recipe import DataConfig

IMAGES: Final = 1024
"""What the layers are fitted on."""
NETWORKS: Final = (
    Trained("allconv", 12_800, 4, width=1 / 6),
    Trained("cifar-resnet18", 12_800, 4, width=0.125),
    Trained("torchvision:mobilenet_v3_small", 12_800, 4),
    Trained("timm:mobilenetv3_small_100", 12_800, 4),
)
REFUSED: Final = "refused"
TRAINED: Final = "trained, with BatchNorm"
FIX: Final = "ModuleValidator.fix"


def run(arguments: list[str]) -> int:
    """Measure what is left of trained networks once Opacus takes them."""
    line = "Train networks with BatchNorm, and make them trainable by Opacus' fix and by pws.private.make_trainable."
    return run_experiment("make-trainable", line, measure, arguments)


def measure(out: Path, quick: bool, say: Say) -> None:
    """Write make-trainable.json and make-trainable.png."""
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"batch_size": 128, "lr": LR, "images": IMAGES, "trained_networks": rows}
    for trained in QUICK if quick else NETWORKS:
        rows.append(row := compare(trained))
        say(", ".join(f"{key} {value}" for key, value in row.items()))
        write_result(out / "make-trainable.json", f"{PROGRAM} make-trainable", result)
    _draw(rows, out / "make-trainable.png")


def compare(trained: Trained) -> dict[str, Any]:
    """Accuracies of one network, in percent of the test images."""
    seed_everything(trained.seed, verbose=False)
    config = DataConfig(trained.dataset, train_images=trained.train_images, batch_size=128, validation=0)
    data = ImageData(config, trained.seed)
    model = network_of(trained, data)
    fit_network(model, data, "bn", LR, trained.epochs)
    row = {**trained.settings, TRAINED: accuracy_of(model, data), FIX: _after_fix(model, data)}
    numbers = list(range(min(IMAGES, len(data.splits.train))))
    images, _ = ImageBatches(data.splits.train, data.splits, seed=0)[0, numbers]
    for name, make in EXAMPLES.items():
        converted = make_trainable(model, make(images), report=lambda _: None)
        if GradSampleModule.validate(converted) or ModuleValidator.validate(converted):
            raise AssertionError(f"{trained.name} on {name} is refused")
        row[f"make_trainable, {name}"] = accuracy_of(converted, data)
    return row


def _after_fix(model: nn.Module, data: ImageData) -> float | str:
    fixed = ModuleValidator.fix(model).train()
    return REFUSED if GradSampleModule.validate(fixed) else accuracy_of(fixed, data)


def white_noise(images: Tensor) -> Tensor:
    """Independent pixels of the images' mean and deviation per channel."""
    return _like(torch.randn(images.shape), images)


def coarse_noise(images: Tensor) -> Tensor:
    """Noise of a quarter of the resolution, enlarged, of the images' mean and deviation per channel."""
    height, width = images.shape[2:]
    small = torch.randn(*images.shape[:2], -(-height // 4), -(-width // 4))
    return _like(interpolate(small, (height, width), mode="bilinear"), images)


def digits(images: Tensor) -> Tensor:
    """Public images of another kind: handwritten digits, enlarged, of the images' mean and deviation per channel."""
    pixels = torch.tensor(load_digits().images[: len(images), None], dtype=images.dtype)
    enlarged = interpolate(pixels, images.shape[2:], mode="bilinear")
    return _like(enlarged.expand(-1, images.shape[1], -1, -1), images)


def _like(noise: Tensor, images: Tensor) -> Tensor:
    dims = (0, 2, 3)
    noise = (noise - noise.mean(dims, keepdim=True)) / noise.std(dims, keepdim=True)
    return noise * images.std(dims, keepdim=True) + images.mean(dims, keepdim=True)


EXAMPLES: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "images": lambda images: images,
    "digits": digits,
    "noise": white_noise,
    "coarse noise": coarse_noise,
}


def trainable_table(result: Result) -> str:
    """Markdown: a line per network."""
    keys = list(result["trained_networks"][0])
    lines = [keys, ["---"] + ["---:"] * (len(keys) - 1)]
    lines += [[str(row[key]) for key in keys] for row in result["trained_networks"]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    figure = new_figure(2.6 * len(rows) + 1, 3.6)
    colours = ["#2471a3", "#c0392b", "#1e8449", "#27ae60", "#7dcea0", "#a9dfbf"]
    states = [key for key in rows[0] if key in (TRAINED, FIX) or key.startswith("make_trainable")]
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        bars = axes.bar(states, [0 if row[state] == REFUSED else row[state] for state in states], color=colours)
        axes.bar_label(bars, [str(row[state]) for state in states], fontsize=8)
        axes.set_ylim(0, 105)
        axes.set_title(row["network"].rpartition(":")[2], fontsize=9)
        axes.tick_params(axis="x", rotation=60, labelsize=8)
    figure.supylabel("test accuracy, %", fontsize=9)
    save_figure(figure, path)
