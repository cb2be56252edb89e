"""What Lightning trains, whatever the task: the optimizer, its schedule, and an end to the run when a number is not finite."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, ClassVar, Final, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pws._errors import PwsError
from pws._mark import marked
from pws._preserve import random_state
from pws.diagnosis import first_non_finite
from pws.methods import Method
from pws.models import ResNet
from pws.optim import NonFiniteGradientError
from pws.surgery import calibrate
from pws.training.callbacks import TEST, VALIDATION, ClipGrad
from pws.training.data import Parts
from pws.training.optimizer import build_optimizer, step_bound
from pws.training.private.spent import Spent
from pws.training.recipe import OptimConfig
from pws.training.results import DetectionEvaluation, Evaluation
from pws.training.schedule import lr_factor
from pws.training.shard import shard


class NonFiniteLossError(ArithmeticError):
    """The loss, or `what` else, went to NaN or infinity at `step` (steps done before it); the output of `layer` went first.

    `verdict` is what a monitor has to say of it.
    """

    ADVICE: Final = (
        "Lower --optim.lr, or bound the step with --optim.step_bound 0.03; of the methods, bn and pws stand the largest "
        "rates. --monitor tells why."
    )

    def __init__(self, step: int, layer: str | None, verdict: str = "", *, what: str = "the loss") -> None:
        where = (
            f"the output of layer {layer!r} was the first to overflow" if layer else "every layer's output was finite"
        )
        super().__init__(f"{what} went non-finite at step {step}: {where}. {verdict or self.ADVICE}")
        self.step, self.layer, self.verdict, self.what = step, layer, verdict, what


class TaskModule(LightningModule, ABC):
    """A network in training; a task says what its losses and metrics are.

    A batch is `(inputs, targets)`. `method` is asked for its bound on the step and for what it does to the gradients; None does
    nothing to them.
    """

    SCORE: ClassVar[str]
    """The metric that tells the best checkpoint: the larger, the better."""

    def __init__(
        self,
        model: nn.Module,
        optim: OptimConfig,
        calibration: Literal["none", "initalpha", "all"] = "none",
        method: Method | None = None,
    ) -> None:
        super().__init__()
        self.model, self.optim, self.calibration, self.method = model, optim, calibration, method
        self._batch: Any = None

    @abstractmethod
    def losses(self, batch: Any) -> dict[str, Tensor]:
        """The losses of a training batch by name; their sum is trained."""

    @abstractmethod
    def score_on(self, batches: Iterable[Any], images: int) -> float:
        """The score on the first `images` images, or a few more, of `batches`; in eval mode, without gradients."""

    @abstractmethod
    def score_line(self, metrics: dict[str, float]) -> str:
        """What a line says of metrics by their names, such as accuracy."""

    @abstractmethod
    def evaluation(self, checkpoint: str, parts: Parts) -> Evaluation | DetectionEvaluation:
        """What the test that ran last has found, on the test images of `parts`."""

    def spent(self) -> Spent | None:
        """The privacy spent until now, if the run is private."""
        return None

    @property
    def part(self) -> str:
        """What the names of logged metrics begin with: val_ or test_."""
        return TEST if self.trainer.testing else VALIDATION

    def test_step(self, batch: Any, index: int) -> Any:
        """As validation_step."""
        return self.validation_step(batch, index)

    def on_test_epoch_end(self) -> None:
        """As on_validation_epoch_end."""
        self.on_validation_epoch_end()

    def configure_model(self) -> None:
        """Shard the network if the strategy does that; Lightning makes the optimizer after it."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard(self.model, self.trainer.strategy.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        """Calibrate on the first step's batch, unless a resumed run carries the kernels in its checkpoint."""
        if self.calibration == "none" or self.trainer.ckpt_path is not None:
            return
        loader = self.trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        precision = self.trainer.precision_plugin
        batches = [precision.convert_input(b) for b in islice(iter(loader), self.trainer.accumulate_grad_batches)]
        with precision.forward_context():
            self.calibrate_on(batches)

    def calibrate_on(self, batches: list[Any]) -> None:
        """Scale the kernels as the recipe says."""
        if self.calibration == "all":
            calibrate(self.model, batches)
            return
        assert isinstance(self.model, ResNet)  # check_calibration has seen to it
        layers = self.model.initalpha_layers()
        calibrate(self.model, batches, target=2.0, only=lambda _, layer: layer in layers)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Draw a step's random numbers (dropout, a detector's samples) from its seed, so that a resumed run draws the same."""
        seed: int = self.trainer.datamodule.seed  # type: ignore[attr-defined]
        step = (seed * 1_000_003 + self.trainer.current_epoch) * 1_000_003 + batch_idx
        torch.manual_seed((step * self.trainer.world_size + self.trainer.global_rank) % 2**63)

    def training_step(self, batch: Any, _: int) -> dict[str, Any]:
        """The sum of the batch's losses, and what is logged."""
        self._batch, self._rewind = batch, random_state(self.model)
        losses = self.losses(batch)
        loss = torch.stack(list(losses.values())).sum() if len(losses) > 1 else next(iter(losses.values()))
        return {"loss": loss, "logged": self.log_losses(batch, loss, losses if len(losses) > 1 else {})}

    def log_losses(self, batch: Any, loss: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Log the loss of a step and its parts, and return them by name; raises what happened if the loss is not finite."""
        means = _mean_over_processes(torch.stack([loss, *parts.values()]).detach())
        if not torch.isfinite(means[0]):
            self._explain(batch)
        logged = {f"train_{name}": mean for name, mean in zip(("loss", *parts), means, strict=True)}
        self.log_dict({f"{name}_step": mean for name, mean in logged.items()})
        return logged

    def _explain(self, batch: Any) -> None:
        """Raise what happened: the same error in all processes, of which perhaps only one has seen it."""
        images = batch[0]
        bad = [number for number, image in enumerate(images) if not torch.isfinite(image).all()]
        for numbers in from_all_processes(bad):
            if numbers:
                raise PwsError(
                    f"the batch of step {self.global_step} holds NaN or infinity in {len(numbers)} of {len(images)} images "
                    f"(first: image {numbers[0]} of the batch). No network can train on it: mend the data or its "
                    "normalization."
                )
        # All processes together: those of a sharded network gather its layers from each other.
        layers = [layer for layer in from_all_processes(first_non_finite(self.model, batch, self._rewind)) if layer]
        raise NonFiniteLossError(self.global_step, layers[0] if layers else None)

    def configure_callbacks(self) -> list[Callback]:
        """The bound on the step's length, if there is one and the optimizer does not hold it itself."""
        bound = step_bound(self.optim, self.method)
        return [] if bound is None or marked(self.model) else [ClipGrad(bound)]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """What the method does to the gradients."""
        if self.method is not None and self.method.gradients is not None:
            self.method.gradients(self.model, optimizer)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Lightning's; an optimizer of `pws.optim` that refuses a gradient which is not finite ends the run."""
        with self.explained():
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """End the run with what happened where an optimizer refuses a gradient."""
        try:
            yield
        except NonFiniteGradientError as error:
            layer = None if self._batch is None else first_non_finite(self.model, self._batch, self._rewind)
            raise NonFiniteLossError(self.trainer.global_step, layer, what="a gradient") from error

    def built_optimizer(self) -> Optimizer:
        """The recipe's."""
        return build_optimizer(self.model, self.optim, step_bound(self.optim, self.method))

    def configure_optimizers(self) -> Any:
        """The recipe's optimizer, its rates multiplied by `lr_factor` after every step."""
        optimizer = self.built_optimizer()
        steps = int(self.trainer.estimated_stepping_batches)
        loader = self.trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        steps_per_epoch = len(loader) // self.trainer.accumulate_grad_batches
        scheduler = LambdaLR(optimizer, lr_factor(self.optim, steps, steps_per_epoch))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def from_all_processes(seen: Any) -> list[Any]:
    """What each process has seen."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [seen]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, seen)
    return gathered


def _mean_over_processes(losses: Tensor) -> Tensor:
    """Those of the whole batch; not finite if they are so in any process, so that all of them end together."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return losses
    distributed.all_reduce(losses)
    return losses / distributed.get_world_size()
