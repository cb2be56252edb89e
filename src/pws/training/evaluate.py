"""Top-1, top-5, loss and accuracy by class of a run's checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pws.errors import PwsError
from pws.training.data import ImageData
from pws.training.module import Classifier
from pws.training.quiet import bare_trainer
from pws.training.recipe_file import load_recipe
from pws.training.run import model_for
from pws.training.run_folder import read_checkpoint


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
    path = run / "checkpoints" / f"{checkpoint}.ckpt" if checkpoint in ("best", "last") else Path(checkpoint)
    if checkpoint == "best" and not path.is_file():  # the run ended before it was validated
        path = path.with_name("last.ckpt")
    load_weights(module, path)
    trainer = bare_trainer()
    results = trainer.validate(module, datamodule=data, verbose=False)[0]
    return Evaluation(
        checkpoint=str(path),
        images=len(data.splits.test),
        accuracy=results["val_accuracy"],
        top5=results["val_top5"],
        loss=results["val_loss"],
        per_class=dict(zip(data.splits.classes, module.per_class, strict=True)),
    )


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a checkpoint's weights; raise `PwsError` unless they are this network's."""
    weights = read_checkpoint(path)["state_dict"]
    own = module.state_dict()
    problems = [
        *(f"{key} is missing" for key in own.keys() - weights.keys()),
        *(f"{key} is not in the network" for key in weights.keys() - own.keys()),
        *(
            f"{key} is {tuple(weights[key].shape)}, the network's is {tuple(own[key].shape)}"
            for key in own.keys() & weights.keys()
            if weights[key].shape != own[key].shape
        ),
    ]
    if problems:
        raise PwsError(
            f"{path} is a checkpoint of another architecture than the run's recipe.yaml describes: "
            f"{len(problems)} of {len(own)} tensors differ, such as: {'; '.join(sorted(problems)[:3])}. "
            "Use the checkpoint with the recipe it was trained with."
        )
    module.load_state_dict(weights)
