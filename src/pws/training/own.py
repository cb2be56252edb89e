"""One's own network and datasets, trained with a recipe: `pws.training.fit`."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, default_collate

from pws._errors import PwsError, shown
from pws._layers import StandardizedLayer
from pws._mark import marked
from pws.training.classifier import Classifier, logits_of
from pws.training.data import RecipeData, seeded
from pws.training.datasets import chosen_images
from pws.training.recipe import DataConfig, ModelConfig, Recipe
from pws.training.run import train
from pws.training.samplers import Key
from pws.training.summary import Summary
from pws.training.tasks import OWN, Task


def fit(
    model: nn.Module,
    train_data: Dataset[Any],
    test_data: Dataset[Any],
    recipe: Recipe,
    folder: str | Path,
    *,
    validation_data: Dataset[Any] | None = None,
    resume: bool = False,
    quiet: bool = False,
    monitor: int | None = None,
) -> Summary:
    """Train your own classifier on your own datasets as `pws train` trains: folder, checkpoints, metrics, resume, test.

        summary = pws.training.fit(network, train_data, test_data, recipe, "runs/mine")
        network.load_state_dict(pws.training.weights("runs/mine"))    # later, in another program

    Args:
        model: maps a batch of inputs to logits. It is trained in place and as it is: convert it before (`pws.convert`), and set
            `model.calibrate` in the recipe if you wish. It ends with the weights that the test data were given to.
        train_data: samples `(input, label)` by number, with a length; inputs are tensors of one shape, normalized as you wish.
            What it draws with torch's random numbers is the same for the same seed, epoch and sample. With
            privacy.augmentations, set data.augment too: it says that these data augment.
        test_data: the same; read once, at the end.
        recipe: its optimizer and trainer count, its seed, and of its data batch_size, workers, train_images and validation.
        folder: the run's folder; must not exist unless `resume`.
        validation_data: what tells the best epoch; if left out, the recipe's share of the training data.
        resume: go on with the run in `folder`, with the same model and data.
        quiet: print nothing.
        monitor: diagnose the network every so many steps.

    Raises:
        PwsError: the model or the data do not fit, or what `pws.training.train` raises it for.
        NonFiniteLossError: the loss went non-finite; summary.json says so too.
    """
    if recipe.task != "classify":
        raise PwsError(
            f"pws.training.fit trains classifiers; this recipe's task is {recipe.task}. A detector of your own trains by its "
            "factory's name: --model.name package.module:factory."
        )
    standardized = bool(marked(model)) or any(isinstance(module, StandardizedLayer) for module in model.modules())
    network = ModelConfig(
        name=type(model).__name__, method="pws" if standardized else "none", calibrate=recipe.model.calibrate
    )
    own = replace(recipe, model=network, data=replace(recipe.data, name=OWN))
    task = Task(
        lambda config, seed: OwnData(config, seed, _parts(model, config, seed, train_data, validation_data, test_data)),
        lambda *_: model.train(),
        Classifier,
        OwnFacts,
    )
    return train(own, Path(folder), resume=resume, quiet=quiet, monitor=monitor, task=task)


@dataclass(frozen=True)
class OwnFacts:
    """What a run says of data that it was given."""

    classes: list[str]
    shape: list[int]
    """Of an input."""

    @classmethod
    def of(cls, data: Any) -> OwnFacts:
        """Those of a run's data."""
        return cls(data.splits.classes, list(_sample(data.splits.test, 0)[0].shape))


@dataclass
class OwnParts:
    """Datasets, as they were given."""

    train: Sized
    validation: Sized | None
    test: Sized
    classes: list[str]


class OwnBatches(Dataset[tuple[Tensor, Tensor]]):
    """Batches of a dataset by epoch and sample numbers."""

    def __init__(self, samples: Any, seed: int, classes: int) -> None:
        self.samples, self.seed, self.classes = samples, seed, classes

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor]:
        epoch, numbers = key
        pairs = []
        for number in numbers:
            with seeded(self.seed, epoch, number):
                pairs.append(_sample(self.samples, number % len(self.samples)))  # copies count on
        try:
            inputs, labels = default_collate(pairs)
        except RuntimeError as error:
            shapes = sorted({tuple(one.shape) for one, _ in pairs})
            raise PwsError(
                f"the inputs of a batch must have one shape; got {shown(shapes)}. Crop or pad them."
            ) from error
        if not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise PwsError(
                f"labels must be 0 to {self.classes - 1}, one for each of the model's {self.classes} outputs; got "
                f"{int(labels.min())} to {int(labels.max())}. Give the model more outputs, or number the classes from 0."
            )
        return inputs, labels


class OwnData(RecipeData):
    """The loaders of datasets that were given."""

    splits: OwnParts

    def __init__(self, config: DataConfig, seed: int, parts: OwnParts) -> None:
        super().__init__(config, seed)
        self.splits = parts

    def batches(self, images: Any, *, train: bool) -> OwnBatches:
        """Samples as the dataset gives them."""
        return OwnBatches(images, self.seed, len(self.splits.classes))


def _parts(model: nn.Module, config: DataConfig, seed: int, train: Any, validation: Any, test: Any) -> OwnParts:
    """The datasets; a part of the training data held out for validation if the recipe wants it and none is given."""
    given = {"train_data": train, "test_data": test} | ({} if validation is None else {"validation_data": validation})
    for name, data in given.items():
        if not isinstance(data, Sized) or not hasattr(data, "__getitem__") or not len(data):
            raise PwsError(
                f"{name} must give samples by number and have a length of 1 or more; got a {type(data).__name__}. Take a "
                "torch.utils.data.Dataset with __len__ and __getitem__."
            )
    chosen, held_out = chosen_images(config, len(train), seed, own_validation=validation is not None)
    if held_out:
        validation = Subset(train, held_out)
    classes = _classes(model, train, _sample(test, 0)[0])
    return OwnParts(train if chosen is None else Subset(train, chosen), validation, test, classes)


def _classes(model: nn.Module, data: Any, example: Tensor) -> list[str]:
    """The dataset's names of them, if it has any; the model is asked how many there are."""
    training = model.training
    parameter = next(model.parameters(), example)
    with torch.no_grad():
        outputs = model.eval()(example[None].to(parameter.device))
    model.train(training)
    names = getattr(data, "classes", None)
    count = len(names) if names else outputs.shape[-1] if isinstance(outputs, Tensor) and outputs.dim() else 0
    logits_of(outputs, count)
    return [str(name) for name in names or range(count)]


def _sample(data: Any, number: int) -> tuple[Tensor, int]:
    sample = data[number]
    if not isinstance(sample, tuple | list) or len(sample) != 2 or not isinstance(sample[0], Tensor):
        raise PwsError(
            f"a sample must be a pair of a tensor and a label; sample {number} is {shown(sample)}. A transform "
            "such as torchvision's ToTensor makes tensors of images."
        )
    try:
        label = int(sample[1])
    except (TypeError, ValueError) as error:
        raise PwsError(f"a label must be a class number; sample {number} has {shown(sample[1])}.") from error
    return sample[0], label
