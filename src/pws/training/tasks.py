"""The tasks of a recipe: what each one's data, network and training are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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
from pws.training.recipe import Recipe, TaskName

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
        ImageData, lambda config, data, method: model_for(config, data.splits, method), Classifier, ImageFacts
    ),
    "detect": Task(DetectionData, detector_for, Detector, ObjectFacts),
}


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
