"""The classifier that Lightning trains."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any, Final, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from pws._errors import PwsError
from pws._mark import marked
from pws._preserve import random_state
from pws.diagnosis import first_non_finite
from pws.methods import Method
from pws.models import ResNet
from pws.optim import NonFiniteGradientError
from pws.surgery import calibrate
from pws.training.callbacks import ClipGrad
from pws.training.optimizer import build_optimizer, step_bound
from pws.training.recipe import OptimConfig
from pws.training.schedule import lr_factor


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


class Classifier(LightningModule):
    """Cross-entropy, the recipe's optimizer and schedule, an end to the run when the loss or a gradient is not finite.

    `method` is asked for its bound on the step and for what it does to the gradients; None does nothing to them.
    """

    def __init__(
        self,
        model: nn.Module,
        optim: OptimConfig,
        num_classes: int,
        calibration: Literal["none", "initalpha", "all"] = "none",
        method: Method | None = None,
    ) -> None:
        super().__init__()
        self.model, self.optim, self.calibration, self.method = model, optim, calibration, method
        self.num_classes = num_classes
        self.test_metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(num_classes, average="micro"),
                "top5": MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro"),
            }
        )
        self.class_accuracy = MulticlassAccuracy(num_classes, average="none")
        self.test_loss = MeanMetric(nan_strategy="disable")  # the default would leave a batch of NaN out of the mean
        self._images: Tensor | None = None
        self.overflowing: str | None = None
        """The layer whose output overflowed first on the test images."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images."""
        return logits_of(self.model(images), self.num_classes)

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

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """Mean cross-entropy of the batch."""
        images, labels = batch
        self._images, self._rewind = images, random_state(self.model)
        loss = F.cross_entropy(self(images), labels, label_smoothing=self.optim.label_smoothing)
        mean = _mean_over_processes(loss)
        if not torch.isfinite(mean):
            self._explain(images)
        self.log("train_loss", mean, on_step=True, on_epoch=True, batch_size=len(labels))
        return loss

    def _explain(self, images: Tensor) -> None:
        """Raise what happened: the same error in all processes, of which perhaps only one has seen it."""
        bad = (~torch.isfinite(images).flatten(1).all(1)).nonzero().flatten().tolist()
        seen = _from_all_processes((bad, None if bad else first_non_finite(self.model, images, self._rewind)))
        for numbers, _ in seen:
            if numbers:
                raise PwsError(
                    f"the batch of step {self.global_step} holds NaN or infinity in {len(numbers)} of {len(images)} images "
                    f"(first: image {numbers[0]} of the batch). No network can train on it: mend the data or its "
                    "normalization."
                )
        layers = [layer for _, layer in seen if layer]
        raise NonFiniteLossError(self.global_step, layers[0] if layers else None)

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        """Add a batch to the metrics."""
        images, labels = batch
        rewind = random_state(self.model)
        logits = self(images).float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        self.test_metrics.update(logits, labels)
        self.class_accuracy.update(logits, labels)
        self.test_loss.update(losses)
        if self.overflowing is None and not torch.isfinite(losses).all():
            self.overflowing = first_non_finite(self.model, images, rewind)

    def on_validation_epoch_end(self) -> None:
        """Log val_accuracy, val_top5 and val_loss, over all processes."""
        loss = self.test_loss.compute()
        if not torch.isfinite(loss):
            layers = [layer for layer in _from_all_processes(self.overflowing) if layer]
            raise NonFiniteLossError(self.trainer.global_step, layers[0] if layers else None)
        values = {f"val_{name}": value for name, value in self.test_metrics.compute().items()}
        self.log_dict({**values, "val_loss": loss})
        self.per_class: list[float] = self.class_accuracy.compute().tolist()
        for metric in (self.test_metrics, self.class_accuracy, self.test_loss):
            metric.reset()

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
        try:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        except NonFiniteGradientError as error:
            layer = None if self._images is None else first_non_finite(self.model, self._images, self._rewind)
            raise NonFiniteLossError(self.trainer.global_step, layer, what="a gradient") from error

    def configure_optimizers(self) -> Any:
        """The recipe's optimizer, its rates multiplied by `lr_factor` after every step."""
        optimizer = build_optimizer(self.model, self.optim, step_bound(self.optim, self.method))
        steps = int(self.trainer.estimated_stepping_batches)
        loader = self.trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        steps_per_epoch = len(loader) // self.trainer.accumulate_grad_batches
        scheduler = LambdaLR(optimizer, lr_factor(self.optim, steps, steps_per_epoch))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def logits_of(outputs: Any, classes: int) -> Tensor:
    """The outputs of a classifier; raises `PwsError` unless they are floating-point numbers `(N, classes)`."""
    shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if not isinstance(outputs, Tensor) or outputs.shape[1:] != (classes,) or not outputs.is_floating_point():
        raise PwsError(
            f"a classifier must return logits (N, classes), here (N, {classes}) for the data's {classes} classes; the model "
            f"returned {shape}. Build it for as many classes (a factory may take num_classes), and let it return them alone."
        )
    return outputs


def _from_all_processes(seen: Any) -> list[Any]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return [seen]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, seen)
    return gathered


def _mean_over_processes(loss: Tensor) -> Tensor:
    """The loss of the whole batch; not finite if it is so in any process, so that all of them end together."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return loss.detach()
    total = loss.detach().clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()
