"""Trained BatchNorm networks, converted with a warm start: accuracy on Fashion-MNIST's test images before, right after, and
after an epoch of fine-tuning. Writes warm_start.json and warm_start.md, network by network, and goes on where it stopped.

    python benchmarks/warm_start.py
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything
from torch import nn

import pws
from pws.bench.result import write_result
from pws.methods import build_method
from pws.models import build_model, model_of
from pws.training.data import ImageBatches, ImageData
from pws.training.module import Classifier
from pws.training.quiet import bare_trainer, quiet_lightning
from pws.training.recipe import DataConfig, OptimConfig

FILE = Path(__file__).parent / "warm_start.json"
EPOCHS = 4
LR, FINE_LR = 0.1, 0.01
EXAMPLES = (64, 1024)
"""Training images that the conversion fits alpha and bias on."""


def network(name: str) -> nn.Module:
    """Ours or another's, with BatchNorm."""
    return (
        model_of(name, num_classes=10, in_channels=1)
        if ":" in name
        else build_model(name, build_method("bn"), in_channels=1)
    )


NETWORKS = {"allconv": 60_000, "pws.models.small:resnet18": 12_800, "timm:mobilenetv3_small_100": 12_800}
"""Name to training images."""


def fit(model: nn.Module, data: ImageData, method: str, lr: float, epochs: int) -> None:
    """Train with SGD, batch 128, cosine to 0."""
    module = Classifier(model, OptimConfig(lr=lr), 10, method=build_method(method))
    bare_trainer(accelerator="cpu", max_epochs=epochs, limit_val_batches=0).fit(module, datamodule=data)


def accuracy(model: nn.Module, data: ImageData) -> float:
    """On all test images, in percent."""
    module = Classifier(deepcopy(model), OptimConfig(), 10)
    found = bare_trainer(accelerator="cpu").validate(module, datamodule=data, verbose=False)
    return round(100 * found[0]["val_accuracy"], 2)


def run(name: str, count: int) -> dict[str, Any]:
    """One network through all states."""
    seed_everything(0, verbose=False)
    data = ImageData(DataConfig(name="fashion-mnist", train_images=count, batch_size=128), 0)
    model = network(name)
    fit(model, data, "bn", LR, EPOCHS)
    found: dict[str, Any] = {"before": accuracy(model, data)}
    for images in EXAMPLES:
        example, _ = ImageBatches(data.splits.train, data.splits, seed=0)[0, list(range(images))]
        plan = pws.plan(model, example, warm_start=True)
        converted = plan.apply()
        found[f"converted on {images}"] = accuracy(converted, data)
        found[f"output error on {images}"] = round(plan.output_error or 0.0, 4)
    fit(converted, data, "pws", FINE_LR, 1)
    found["after an epoch"] = accuracy(converted, data)
    fit(model, data, "bn", FINE_LR, 1)
    found["BatchNorm after as much"] = accuracy(model, data)
    print(name, found, flush=True)
    return {"network": name, "train_images": count, **found}


def table(networks: list[dict[str, Any]]) -> str:
    """In Markdown."""
    head = ["network", "train_images", *(key for key in networks[0] if key not in ("network", "train_images"))]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *([str(entry[key]) for key in head] for entry in networks)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    """Run what is missing."""
    quiet_lightning()
    networks = json.loads(FILE.read_text())["networks"] if FILE.is_file() else []
    for name, count in NETWORKS.items():
        if name not in {entry["network"] for entry in networks}:
            networks.append(run(name, count))
            settings = {"epochs": EPOCHS, "batch_size": 128, "lr": LR, "fine_tuning_lr": FINE_LR, "seed": 0}
            write_result(FILE, "python benchmarks/warm_start.py", {**settings, "networks": networks})
    FILE.with_suffix(".md").write_text(table(networks))


if __name__ == "__main__":
    main()
