"""Classification: cross-entropy, accuracy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from pws._errors import PwsError
from pws._preserve import random_state
from pws.diagnosis import first_non_finite
from pws.methods import Method
from pws.training.data import Parts
from pws.training.module import NonFiniteLossError, TaskModule, from_all_processes
from pws.training.recipe import OptimConfig
from pws.training.results import Evaluation


class Classifier(TaskModule):
    """Mean cross-entropy of images `(N, C, H, W)` and labels `(N,)`; top-1, top-5 and accuracy by class.

    In training labels may be shares of the classes, `(N, classes)`, as mixup makes them.
    """

    SCORE = "accuracy"

    def __init__(
        self,
        model: nn.Module,
        optim: OptimConfig,
        num_classes: int,
        calibration: Literal["none", "initalpha", "all"] = "none",
        method: Method | None = None,
    ) -> None:
        super().__init__(model, optim, calibration, method)
        self.num_classes = num_classes
        self.metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(num_classes, average="micro"),
                "top5": MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro"),
            }
        )
        self.class_accuracy = MulticlassAccuracy(num_classes, average="none")
        self.mean_loss = MeanMetric(nan_strategy="disable")  # the default would leave a batch of NaN out of the mean
        self.overflowing: str | None = None
        """The layer whose output overflowed first."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images."""
        return logits_of(self.model(images), self.num_classes)

    def losses(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Mean cross-entropy of the batch."""
        images, labels = batch
        return {"loss": F.cross_entropy(self(images), labels, label_smoothing=self.optim.label_smoothing)}

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """Add a batch to the metrics; returns the logits."""
        images, labels = batch
        rewind = random_state(self.model)
        logits: Tensor = self(images).float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        self.metrics.update(logits, labels)
        self.class_accuracy.update(logits, labels)
        self.mean_loss.update(losses)
        if self.overflowing is None and not torch.isfinite(losses).all():
            self.overflowing = first_non_finite(self.model, batch, rewind)
        return logits

    def on_validation_epoch_end(self) -> None:
        """Log accuracy, top5 and loss, over all processes."""
        loss = self.mean_loss.compute()
        if not torch.isfinite(loss):
            layers = [layer for layer in from_all_processes(self.overflowing) if layer]
            raise NonFiniteLossError(self.trainer.global_step, layers[0] if layers else None)
        values = {**self.metrics.compute(), "loss": loss}
        self.log_dict({f"{self.part}{name}": value for name, value in values.items()})
        self.last = {name: float(value) for name, value in values.items()}
        self.per_class: list[float] = self.class_accuracy.compute().tolist()
        for metric in (self.metrics, self.class_accuracy, self.mean_loss):
            metric.reset()

    def score_on(self, batches: Iterable[Any], images: int) -> float:
        """Accuracy."""
        right = seen = 0
        for inputs, labels in batches:
            right += int((self(inputs).argmax(1) == labels).sum())
            seen += len(labels)
            if seen >= images:
                break
        return right / seen

    def evaluation(self, checkpoint: str, parts: Parts) -> Evaluation:
        """Accuracy, loss, accuracy by class."""
        return Evaluation(
            checkpoint=checkpoint,
            images=len(parts.test),
            accuracy=self.last["accuracy"],
            top5=self.last["top5"],
            loss=self.last["loss"],
            per_class=dict(zip(parts.classes, self.per_class, strict=True)),
        )

    def score_line(self, metrics: dict[str, float]) -> str:
        """Loss and accuracy."""
        return f"loss {metrics['loss']:.4f}  accuracy {100 * metrics['accuracy']:.2f} %"


def logits_of(outputs: Any, classes: int) -> Tensor:
    """The outputs of a classifier; raises `PwsError` unless they are floating-point numbers `(N, classes)`."""
    shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if not isinstance(outputs, Tensor) or outputs.shape[1:] != (classes,) or not outputs.is_floating_point():
        raise PwsError(
            f"a classifier must return logits (N, classes), here (N, {classes}) for the data's {classes} classes; the model "
            f"returned {shape}. Build it for as many classes (a factory may take num_classes), and let it return them alone."
        )
    return outputs
