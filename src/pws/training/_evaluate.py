"""A run's checkpoint on the test images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pws._errors import PwsError
from pws.training.checkpoints import checkpoint_path, load_weights
from pws.training.data import RecipeData
from pws.training.facts import DATA, write_facts
from pws.training.module import TaskModule
from pws.training.quiet import bare_trainer, real_interrupts
from pws.training.recipe import Recipe
from pws.training.recipe_file import load_recipe
from pws.training.results import DetectionEvaluation, Evaluation
from pws.training.sheet import worst_images, write_sheet
from pws.training.tasks import TASKS, data_of, module_of


@dataclass(frozen=True)
class TrainedRun:
    """A run's network with the weights of a checkpoint, and the run's data."""

    recipe: Recipe
    module: TaskModule
    data: RecipeData
    checkpoint: Path


def load_trained(run: Path, checkpoint: str = "best") -> TrainedRun:
    """A run with its checkpoint: "best", "last" or the path of a file.

    Raises:
        PwsError: the run or the checkpoint is missing, corrupt, or of another architecture.
    """
    if not (run / "recipe.yaml").is_file():
        raise PwsError(f"{run} is no run folder: it has no recipe.yaml. Give the folder that `pws train` printed.")
    recipe = load_recipe(run / "recipe.yaml")
    data = data_of(recipe)
    module = module_of(recipe, data, fresh=False)
    path = checkpoint_path(run, checkpoint)
    load_weights(module, path, recipe)
    return TrainedRun(recipe, module, data, path)


def evaluate(run: Path, checkpoint: str = "best", sheet: Path | None = None) -> Evaluation | DetectionEvaluation:
    """Evaluate a run's checkpoint on the test images.

    Args:
        run: the folder of the run.
        checkpoint: "best", "last" or the path of a file.
        sheet: write a picture of the worst test images to this file.

    Raises:
        PwsError: the run or the checkpoint is missing, corrupt, or of another architecture.
    """
    loaded = load_trained(run, checkpoint)
    if not (run / DATA).exists():  # of a run before there was such a file: `pws.load` asks for it
        write_facts(run, TASKS[loaded.recipe.task].facts.of(loaded.data))
    worst = None if sheet is None else worst_images(loaded.data)
    with real_interrupts():
        trainer = bare_trainer(callbacks=[] if worst is None else [worst])
        trainer.test(loaded.module, datamodule=loaded.data, verbose=False)
    if sheet is not None and worst is not None:
        write_sheet(worst, sheet)
    return loaded.module.evaluation(str(loaded.checkpoint), loaded.data.splits)
