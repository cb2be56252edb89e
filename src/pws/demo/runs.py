"""The runs of the demonstration: a method at a learning rate, trained by the same code as `pws train`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from pws.diagnosis import CollapseWarning, Monitor
from pws.optim.bound import STEP_BOUND
from pws.training.classifier import Classifier
from pws.training.data import ImageData
from pws.training.guessing import GUESSING_ACCURACY, GUESSING_LOSS
from pws.training.module import NonFiniteLossError
from pws.training.monitor import MonitorCallback
from pws.training.network import model_for
from pws.training.quiet import bare_trainer, real_interrupts
from pws.training.recipe import DataConfig, ModelConfig, OptimConfig, Recipe, TrainerConfig

METHOD_ORDER: Final = ("none", "wn", "gn", "bn", "pws")
LEARNING_RATES: Final = {"small": 0.01, "large": 0.3, "very large": 1.0}
CONTROL: Final = "none, step bounded"
"""The row that shows what bounding the step does by itself."""


@dataclass(frozen=True)
class DemoRun:
    """A method at a learning rate."""

    row: str
    method: str
    lr: float
    bounded: bool


@dataclass(frozen=True)
class DemoResult:
    """How a run ended."""

    accuracy: float | None
    """The share of the test images, in [0, 1]; None if the loss went non-finite."""
    collapse_step: int | None = None
    """Where the loss went non-finite, or from where on it stayed at that of a guess; None if the network trained."""
    non_finite_layer: str | None = None
    variances: tuple[float, ...] = ()
    """Variance of the logits of each step's batch, as long as the loss was finite."""
    verdict: str = ""
    """What the monitor says."""
    average_gradients: dict[str, float] = field(default_factory=dict)
    """Layer to `n` times the average-gradient ratio in the first step: how many times the square of the average gradient is
    what independent gradients would make it."""

    @property
    def collapsed(self) -> bool:
        """Whether the loss went non-finite or the network learnt nothing."""
        return self.accuracy is None or self.accuracy < GUESSING_ACCURACY

    def __str__(self) -> str:
        if self.accuracy is None:
            return f"NaN @ step {self.collapse_step}"
        if self.collapsed:
            return f"stuck @ step {self.collapse_step}"
        return f"{100 * self.accuracy:.1f} %"


def all_runs() -> list[DemoRun]:
    """Every method at every learning rate, then the control."""
    rows = [(name, name, name == "pws") for name in METHOD_ORDER] + [(CONTROL, "none", True)]
    return [DemoRun(row, method, lr, bounded) for row, method, bounded in rows for lr in LEARNING_RATES.values()]


def recipe_of_run(run: DemoRun, epochs: int = 5) -> Recipe:
    """The digits at 16 x 16, the 9-convolution network at a quarter of its width, batch 64."""
    return Recipe(
        model=ModelConfig(name="allconv", method=run.method, width=0.25),
        data=DataConfig(name="digits", image_size=16, batch_size=64, validation=0),
        optim=OptimConfig(lr=run.lr, schedule="linear", step_bound=STEP_BOUND if run.bounded else None),
        trainer=TrainerConfig(epochs=epochs, accelerator="cpu", devices=1),
    )


def data_and_network(recipe: Recipe) -> tuple[ImageData, Classifier]:
    """Data and network of a recipe, the same on every call."""
    data = ImageData(recipe.data, recipe.seed)
    seed_everything(recipe.seed, workers=True, verbose=False)
    return data, Classifier(model_for(recipe.model, data.splits), recipe.optim, len(data.splits.classes))


def train_run(run: DemoRun, epochs: int, progress: Callable[[int, int], None]) -> tuple[DemoResult, Monitor]:
    """Train under a monitor; `progress(steps_done, steps)` is called after every step."""
    recipe = recipe_of_run(run, epochs)
    data, module = data_and_network(recipe)
    watch, monitoring = _Watch(progress), MonitorCallback(every=22)
    trainer = bare_trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[watch, monitoring],
    )
    failure: NonFiniteLossError | None = None
    accuracy: float | None = None
    try:
        with warnings.catch_warnings(), real_interrupts():
            warnings.simplefilter("ignore", CollapseWarning)  # the result says so
            trainer.fit(module, datamodule=data)
            accuracy = float(trainer.test(module, datamodule=data, verbose=False)[0]["test_accuracy"])
    except NonFiniteLossError as error:
        failure = error
    monitor = monitoring.monitor
    assert monitor is not None
    collapse_step = failure.step if failure else watch.guessing_from() if (accuracy or 0) < GUESSING_ACCURACY else None
    result = DemoResult(
        accuracy,
        collapse_step,
        failure.layer if failure else None,
        watch.finite_variances(),
        str(monitor.verdict),
        {layer.name: (layer.average_gradient_ratio or 0.0) * layer.fan_in for layer in monitor.history[0].layers},
    )
    return result, monitor


class _Watch(Callback):
    """Reports progress, keeps the losses and the variance of the logits."""

    def __init__(self, progress: Callable[[int, int], None]) -> None:
        self.progress = progress
        self.losses: list[float] = []
        self.variances: list[float] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        def keep(layer: nn.Module, _: object, logits: Tensor) -> None:
            if layer.training:
                self.variances.append(float(logits.detach().double().var()))

        module.model.register_forward_hook(keep)  # type: ignore[union-attr]

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *_: object) -> None:
        self.losses.append(float(outputs["loss"]))
        self.progress(trainer.global_step, int(trainer.estimated_stepping_batches))

    def finite_variances(self) -> tuple[float, ...]:
        """The variance of the logits in every step that ended with a finite loss."""
        return tuple(self.variances[: len(self.losses)])

    def guessing_from(self) -> int:
        """The step from which on every loss was that of a guess, or worse."""
        better = [step for step, loss in enumerate(self.losses) if loss < GUESSING_LOSS]
        return better[-1] + 1 if better else 0
