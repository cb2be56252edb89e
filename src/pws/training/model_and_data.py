"""A model with a batch of data and a loss, which commands look at: of a run, a recipe, or a model of anybody's."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, Final

import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.nn import functional as F

from pws._batch import on_device, takes_targets, tensors_in, total
from pws._errors import PwsError, UnknownNameError
from pws.models import model_of
from pws.models.detectors import resize_to
from pws.training.checkpoints import checkpoint_path, load_weights
from pws.training.data import ImageData, check_shares
from pws.training.datasets import DATASETS
from pws.training.detect.data import DetectionData
from pws.training.detect.datasets import DETECTION_DATASETS
from pws.training.memory import check_memory
from pws.training.recipe import DataConfig
from pws.training.recipe_file import find_recipe, load_recipe
from pws.training.tasks import data_of, module_of

FORECAST_BATCHES: Final = 6
RANDOM: Final = "random"
"""The images that need no dataset: standard normal pixels with random labels."""


@dataclass
class ModelAndData:
    """A model, the data that go through it, and how it is trained."""

    title: str
    model: nn.Module
    images: Any
    """A tensor, or a detector's list of images."""
    labels: Any
    """A tensor, or a detector's list of targets; None where the loss draws random ones."""
    lr: float | None = None
    momentum: float = 0.0
    more: list[tuple[Any, Any]] = field(default_factory=list)
    """The training batches that follow, for a forecast."""

    def loss(self, outputs: Any, labels: Tensor | None = None) -> Tensor:
        """Cross-entropy of the first floating-point output; over each pixel for an output of maps. A detector's own losses."""
        if isinstance(self.labels, list):
            losses: Tensor = total(outputs)
            return losses
        logits = next((t for t in tensors_in(outputs) if t.is_floating_point() and t.dim() > 1), None)
        if logits is None:
            raise PwsError(f"the model must return logits (N, classes, ...); it returned a {type(outputs).__name__}.")
        if labels is None:
            shape, generator = (len(logits), *logits.shape[2:]), torch.Generator().manual_seed(0)
            labels = torch.randint(logits.shape[1], shape, generator=generator).to(logits.device)
        elif int(labels.max()) >= logits.shape[1]:
            raise PwsError(
                f"the data's labels go up to {int(labels.max())}, and the model has {logits.shape[1]} outputs. Build it for as "
                "many classes as the data has."
            )
        return F.cross_entropy(logits, labels)

    def to(self, device: torch.device) -> None:
        """Move everything."""
        self.model.to(device)
        self.images, self.labels, self.more = on_device((self.images, self.labels, self.more), device)

    @property
    def example(self) -> Any:
        """What `pws.plan` takes: the images, with the targets of a detector."""
        return (self.images, self.labels) if isinstance(self.labels, list) else self.images

    @property
    def batch(self) -> tuple[Any, ...]:
        """What `pws.diagnose` takes."""
        return (self.images,) if self.labels is None else (self.images, self.labels)


def load_run(given: str, checkpoint: str = "last", batch_size: int | None = None) -> ModelAndData:
    """Load a run's folder, one of its checkpoint files, or a recipe, whose network is at its initialization.

    Args:
        given: the path, or a shipped recipe's name.
        checkpoint: last, best or init, for a run's folder.
        batch_size: of the first training batch; the recipe's if left out.

    Raises:
        PwsError: there is no such run, recipe or checkpoint, or the checkpoint does not fit the run's network.
    """
    path = Path(given)
    weights = path if path.suffix == ".ckpt" else None
    folder = path.parent.parent if weights else path
    if weights and not (folder / "recipe.yaml").is_file():
        raise PwsError(
            f"a checkpoint is read with the recipe of its run, and {folder / 'recipe.yaml'} does not exist. Leave the file "
            "where `pws train` wrote it, in RUN/checkpoints/."
        )
    is_run = (folder / "recipe.yaml").is_file()
    recipe = load_recipe(folder / "recipe.yaml" if is_run else find_recipe(given))
    if weights is None and is_run and checkpoint != "init":
        weights = checkpoint_path(folder, checkpoint)
    data = data_of(replace(recipe, data=replace(recipe.data, batch_size=batch_size or recipe.data.batch_size)))
    check_shares(len(data.splits.train), data.config.batch_size, world=1, accumulate=1)
    seed_everything(recipe.seed, workers=True, verbose=False)
    module = module_of(recipe, data, fresh=weights is None)
    (images, labels), *more = islice(data.train_dataloader(), FORECAST_BATCHES)
    if weights is not None:
        load_weights(module, weights, recipe)
    elif recipe.model.calibrate != "none":
        module.calibrate_on([images])
    state = "at initialization" if weights is None else f"with {weights.name}"
    optim, title = recipe.optim, f"{recipe.name} {state}"
    if optim.name != "sgd":  # critical rates and forecasts are those of SGD
        return ModelAndData(title, module.model, images, labels, more=more)
    return ModelAndData(title, module.model, images, labels, optim.lr or None, optim.momentum, more)


def load_model(
    spec: str,
    data: str = RANDOM,
    *,
    root: str | None = None,
    batch_size: int = 32,
    image_size: int | None = None,
    input_shape: list[int] | None = None,
) -> ModelAndData:
    """Load a model from torchvision, timm or any importable factory, with random weights.

    Args:
        spec: torchvision:NAME, timm:NAME or package.module:factory (a function without arguments that returns a module).
        data: a dataset's name, or random.
        root: the dataset's folder.
        batch_size: images of the batch.
        image_size: pixels per side; 224 for random images, the data's own if left out.
        input_shape: of one random sample, where the model takes no square images: sequences, volumes, tables.

    Raises:
        PwsError: the model or the data can't be had.
    """
    seed_everything(0, workers=True, verbose=False)
    model = model_of(spec)
    if takes_targets(model):
        return _detector(spec, model, data, root, batch_size, image_size)
    if data == RANDOM:
        side = image_size or 224
        shape = input_shape or [_channels(model) or 3, side, side]
        check_memory(4 * batch_size * prod(shape), f"a batch of {batch_size:,} inputs of shape {tuple(shape)}")
        images = torch.randn(batch_size, *shape)
        return ModelAndData(f"{spec} on random images", model, images, None)
    if input_shape:
        raise PwsError(
            f"--input-shape is that of random samples; the data {data!r} have a shape of their own. Leave one out."
        )
    if data not in DATASETS:
        raise UnknownNameError("dataset", data, [RANDOM, *DATASETS])
    config = DataConfig(name=data, batch_size=batch_size, image_size=image_size, validation=0)
    source = ImageData(replace(config, root=root) if root else config, seed=0)
    check_shares(len(source.splits.train), batch_size, world=1, accumulate=1)
    batches = list(islice(source.train_dataloader(), FORECAST_BATCHES))
    if batches[0][0].shape[1] == 1 and _channels(model) == 3:
        batches = [(images.expand(-1, 3, -1, -1), labels) for images, labels in batches]  # grey images, shown as colour
    (images, labels), *more = batches
    return ModelAndData(f"{spec} on {data}", model, images, labels, more=more)


def _detector(
    spec: str, model: nn.Module, data: str, root: str | None, batch_size: int, image_size: int | None
) -> ModelAndData:
    """A model that takes targets in training, with images of a detection dataset."""
    if data not in DETECTION_DATASETS:
        raise UnknownNameError(
            f"dataset with objects, which {spec} needs (--data digit-scenes needs no files):", data, DETECTION_DATASETS
        )
    config = DataConfig(name=data, batch_size=batch_size, image_size=image_size, validation=0)
    source = DetectionData(replace(config, root=root) if root else config, seed=0)
    check_shares(len(source.splits.train), batch_size, world=1, accumulate=1)
    (images, targets), *more = islice(source.train_dataloader(), FORECAST_BATCHES)
    if image_size is not None:
        resize_to(model, image_size)
    return ModelAndData(f"{spec} on {data}", model, images, targets, more=more)


def _channels(model: nn.Module) -> int | None:
    """The input channels of the first convolution registered."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return next((module.in_channels for module in model.modules() if isinstance(module, kinds)), None)
