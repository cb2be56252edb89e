"""Trained BatchNorm networks, converted with a warm start: accuracy before, right after, and after an epoch more."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lightning.pytorch import seed_everything
from torch import nn

from benchmarks.experiment import PROGRAM, Say, run_experiment
from pws.bench.plotting import new_figure, save_figure
from pws.bench.result_file import Result, read_result, write_result
from pws.methods import build_method
from pws.models import build_model, model_of
from pws.surgery import plan
from pws.training.classifier import Classifier
from pws.training.data import ImageBatches, ImageData
from pws.training.quiet import bare_trainer, real_interrupts
from pws.training.recipe import DataConfig, OptimConfig

LR: Final = 0.1
FINE_LR: Final = 0.01
EXAMPLES: Final = (64, 1024)
"""Training images that the conversion fits the layers on."""
STATES: Final = ("before", *(f"fitted on {images}" for images in EXAMPLES), "after an epoch", "bn, an epoch more")
"""The states of a network, each with its accuracy."""


@dataclass(frozen=True)
class Trained:
    """What is trained, then converted."""

    network: str
    train_images: int
    epochs: int
    dataset: str = "fashion-mnist"
    width: float = 1.0
    seed: int = 0

    @property
    def name(self) -> str:
        """With the width, where that is not 1."""
        return self.network if self.width == 1 else f"{self.network} x {self.width:.2g}"

    @property
    def settings(self) -> dict[str, Any]:
        """What tells results apart."""
        return {"network": self.name, "train_images": self.train_images, "epochs": self.epochs, "seed": self.seed}


NETWORKS: Final = (
    *(Trained("allconv", 12_800, 6, width=1 / 3, seed=seed) for seed in range(2)),
    Trained("cifar-resnet18", 12_800, 6, width=0.25),
    Trained("timm:mobilenetv3_small_100", 12_800, 6),
)
QUICK: Final = (Trained("stack4", 1_200, 6, "digits", 0.25),)


@dataclass
class StoredWarmStart:
    """What tells an entry of the result file from others."""

    network: str
    train_images: int
    epochs: int
    seed: int


def run(arguments: list[str]) -> int:
    """Measure what a conversion leaves of trained networks."""
    line = "Train networks with BatchNorm, convert them with a warm start, and train them for an epoch more."
    return run_experiment("warm-start", line, measure, arguments)


def measure(out: Path, quick: bool, say: Say) -> None:
    """Go on with what warm-start.json holds; write it and warm-start.png."""
    path, chosen = out / "warm-start.json", QUICK if quick else NETWORKS
    done = (read_result(path, "networks", list, StoredWarmStart) or {"networks": []})["networks"]
    # An entry of other settings, or without a state, is made anew.
    whole = [entry for entry in done if all(isinstance(entry.get(state), int | float) for state in STATES)]
    found = {t: entry for t in chosen for entry in whole if entry.items() >= t.settings.items()}
    result: dict[str, Any] = {"batch_size": 128, "lr": LR, "fine_tuning_lr": FINE_LR}
    for trained in chosen:
        if trained not in found:
            found[trained] = convert_trained(trained, say)
        result["networks"] = [found[t] for t in chosen if t in found]
        write_result(path, f"{PROGRAM} warm-start", result)
    _draw(result["networks"], out / "warm-start.png")


def convert_trained(trained: Trained, say: Say) -> dict[str, Any]:
    """One network through all states; accuracies in percent of the test images."""
    seed_everything(trained.seed, verbose=False)
    config = DataConfig(trained.dataset, train_images=trained.train_images, batch_size=128, validation=0)
    data = ImageData(config, trained.seed)
    model = network_of(trained, data)
    fit_network(model, data, "bn", LR, trained.epochs)
    found: dict[str, Any] = dict(trained.settings)
    found["before"] = accuracy_of(model, data)
    for images in EXAMPLES:
        numbers = list(range(min(images, len(data.splits.train))))
        example, _ = ImageBatches(data.splits.train, data.splits, seed=0)[0, numbers]
        made = plan(model, example, warm_start=True)
        converted = made.apply()
        found[f"fitted on {images}"] = accuracy_of(converted, data)
        found[f"output error, {images}"] = round(made.fit(), 4)
    fit_network(converted, data, "pws", FINE_LR, 1)
    found["after an epoch"] = accuracy_of(converted, data)
    fit_network(model, data, "bn", FINE_LR, 1)
    found["bn, an epoch more"] = accuracy_of(model, data)
    say(", ".join(f"{key} {value}" for key, value in found.items()))
    return found


def network_of(trained: Trained, data: ImageData) -> nn.Module:
    """Its network with BatchNorm, not trained yet."""
    image, _ = data.splits.test.get([0])
    sizes = {"num_classes": len(data.splits.classes), "in_channels": image.shape[1]}
    if ":" in trained.network:
        return model_of(trained.network, **sizes)
    return build_model(trained.network, build_method("bn"), width=trained.width, **sizes)


def fit_network(model: nn.Module, data: ImageData, method: str, lr: float, epochs: int) -> None:
    """SGD, cosine to 0."""
    module = Classifier(model, OptimConfig(lr=lr), len(data.splits.classes), method=build_method(method))
    with real_interrupts():
        bare_trainer(accelerator="cpu", max_epochs=epochs).fit(module, datamodule=data)


def accuracy_of(model: nn.Module, data: ImageData) -> float:
    """Percent of the test images."""
    module = Classifier(deepcopy(model), OptimConfig(), len(data.splits.classes))
    with real_interrupts():
        found = bare_trainer(accelerator="cpu").test(module, datamodule=data, verbose=False)
    return round(100 * found[0]["test_accuracy"], 2)


def warm_start_table(result: Result) -> str:
    """Markdown: a line per network."""
    keys = list(result["networks"][0])
    lines = [keys, ["---"] + ["---:"] * (len(keys) - 1)]
    lines += [[str(entry[key]) for key in keys] for entry in result["networks"]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _draw(networks: list[dict[str, Any]], path: Path) -> None:
    figure = new_figure(3.2 * len(networks) + 1, 3.6)
    colours = ["#2471a3", "#a9dfbf", "#52be80", "#1e8449", "#5499c7"]
    for axes, entry in zip(figure.subplots(1, len(networks), squeeze=False)[0], networks, strict=True):
        values = [entry[state] for state in STATES]
        bars = axes.bar(STATES, values, color=colours)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
        axes.set_ylim(0, 105)
        axes.set_title(f"{entry['network'].rpartition(':')[2]}, seed {entry['seed']}", fontsize=9)
        axes.tick_params(axis="x", rotation=30, labelsize=8)
    figure.supylabel("test accuracy, %", fontsize=9)
    save_figure(figure, path)
