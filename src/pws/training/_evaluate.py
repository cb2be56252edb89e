"""Top-1, top-5, loss and accuracy by class of a run's checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pws._errors import PwsError
from pws.training.checkpoints import checkpoint_path, load_weights
from pws.training.data import ImageData
from pws.training.module import Classifier
from pws.training.network import model_for
from pws.training.quiet import bare_trainer, real_interrupts
from pws.training.recipe_file import load_recipe


@dataclass
class Evaluation:
    """A checkpoint on the test images; accuracies in [0, 1]."""

    checkpoint: str
    images: int
    accuracy: float
    top5: float
    """Top-k with k the number of classes where there are fewer than five."""
    loss: float
    per_class: dict[str, float]


def evaluate(run: Path, checkpoint: str = "best") -> Evaluation:
    """Evaluate a run's checkpoint: "best", "last" or the path of a file.

    Raises:
        PwsError: the run or the checkpoint is missing, corrupt, or of another architecture.
    """
    if not (run / "recipe.yaml").is_file():
        raise PwsError(f"{run} is no run folder: it has no recipe.yaml. Give the folder that `pws train` printed.")
    recipe = load_recipe(run / "recipe.yaml")
    data = ImageData(recipe.data, recipe.seed)
    module = Classifier(model_for(recipe.model, data.splits), recipe.optim, len(data.splits.classes))
    path = checkpoint_path(run, checkpoint)
    load_weights(module, path, recipe)
    trainer = bare_trainer()
    with real_interrupts():
        results = trainer.validate(module, datamodule=data, verbose=False)[0]
    return Evaluation(
        checkpoint=str(path),
        images=len(data.splits.test),
        accuracy=results["val_accuracy"],
        top5=results["val_top5"],
        loss=results["val_loss"],
        per_class=dict(zip(data.splits.classes, module.per_class, strict=True)),
    )
