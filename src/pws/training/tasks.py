"""The tasks of a recipe: what each one's data, network and training are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from torch import nn

from pws._errors import PwsError
from pws.methods import Method
from pws.training.classifier import Classifier
from pws.training.data import ImageData, RecipeData
from pws.training.detect.backbone import stages_trained
from pws.training.detect.data import DetectionData
from pws.training.detect.detector import Detector
from pws.training.detect.facts import ObjectFacts
from pws.training.detect.network import detector_for
from pws.training.facts import ImageFacts
from pws.training.module import TaskModule
from pws.training.network import check_calibration, method_for, model_for
from pws.training.private.classifier import PrivateClassifier
from pws.training.private.config import check_delta
from pws.training.private.engine import noise_for
from pws.training.recipe import DataConfig, Recipe, TaskName

OWN: Final = "own"
"""The name of data that were given in Python."""


@dataclass(frozen=True)
class Task:
    """What a task brings."""

    data: Callable[..., RecipeData]
    """From the recipe's data settings and its seed."""
    network: Callable[..., nn.Module]
    """From the recipe's model settings, the data and the method."""
    module: Callable[..., TaskModule]
    """From the network, the optimizer's settings, the number of classes, the calibration and the method."""
    facts: Any
    """What the run keeps of its data (a class of `Facts`); `facts.of(data)` are those of some data."""


TASKS: Final[dict[TaskName, Task]] = {
    "classify": Task(
        ImageData,
        lambda config, data, method, noise=False: model_for(config, data.splits, method, noise=noise),
        Classifier,
        ImageFacts,
    ),
    "detect": Task(DetectionData, detector_for, Detector, ObjectFacts),
}


def trained_task(recipe: Recipe, task: Task | None = None) -> Task:
    """What is trained: the recipe's task, or the one given, in private where the recipe wants that.

    Raises:
        PwsError: the recipe names no task and no data, and no task is given.
    """
    if task is None:
        check_named(recipe)
        task = TASKS[recipe.task]
    return _private(task, recipe) if recipe.privacy.wanted else task


def _private(task: Task, recipe: Recipe) -> Task:
    privacy, trainer = recipe.privacy, recipe.trainer

    def data(config: DataConfig, seed: int) -> RecipeData:
        loaded = task.data(config, seed)
        loaded.copies = privacy.augmentations
        images = len(loaded.splits.train)
        check_delta(privacy, images)
        steps = trainer.epochs * -(-images // config.batch_size)
        noise_for(privacy, images, config.batch_size, min(steps, trainer.max_steps or steps))  # now, if there is none
        return loaded

    network = partial(task.network, noise=True) if task is TASKS["classify"] else task.network
    return replace(task, data=data, network=network, module=partial(PrivateClassifier, privacy=privacy))


def data_of(recipe: Recipe) -> RecipeData:
    """The recipe's data.

    Raises:
        PwsError: they are none that have a name.
    """
    check_named(recipe)
    return TASKS[recipe.task].data(recipe.data, recipe.seed)


def check_named(recipe: Recipe) -> None:
    """Raise `PwsError` if the recipe is of a run whose network and data no recipe can name."""
    if recipe.data.name == OWN:
        raise PwsError(
            f"this run trained a {recipe.model.name} that pws.training.fit was given in Python, with its data: a recipe can't "
            "name them. Build the network there, and load its weights: network.load_state_dict(pws.training.weights(RUN))."
        )


def module_of(
    recipe: Recipe, data: RecipeData, method: Method | None = None, *, fresh: bool = True, task: Task | None = None
) -> TaskModule:
    """The recipe's network, ready to be trained; `method` replaces the recipe's, `task` the one of its name.

    Where it is not `fresh`, a checkpoint follows: the backbone's run, which may be gone by then, is not read.
    """
    task, method = task or TASKS[recipe.task], method or method_for(recipe.model)
    config = recipe.model
    if not fresh:
        config = replace(config, backbone=None, trainable_stages=stages_trained(config))
    model = task.network(config, data, method)
    check_calibration(recipe.model, model)
    return task.module(model, recipe.optim, len(data.splits.classes), recipe.model.calibrate, method)
