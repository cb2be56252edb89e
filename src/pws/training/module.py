"""The classifier that Lightning trains."""

from __future__ import annotations

from itertools import islice
from typing import Any, Final, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from pws import calibrate, param_groups
from pws.diagnosis import first_non_finite
from pws.errors import PwsError
from pws.layers import StandardizedLayer
from pws.methods import Method
from pws.models import ResNet
from pws.together import Together, standardize_together
from pws.training.callbacks import ClipGrad
from pws.training.recipe import OptimConfig
from pws.training.schedule import lr_factor


class NonFiniteLossError(ArithmeticError):
    """The loss went to NaN or infinity at `step` (steps done before it); the output of `layer` went first.

    `verdict` is what a monitor has to say of it.
    """

    ADVICE: Final = (
        "Lower --optim.lr, or bound the step with --optim.step_bound 0.03; of the methods, bn and pws stand the largest "
        "rates. --monitor tells why."
    )

    def __init__(self, step: int, layer: str | None, verdict: str = "") -> None:
        where = (
            f"the output of layer {layer!r} was the first to overflow" if layer else "every layer's output was finite"
        )
        super().__init__(f"the loss went non-finite at step {step}: {where}. {verdict or self.ADVICE}")
        self.step, self.layer, self.verdict = step, layer, verdict


class Classifier(LightningModule):
    """Cross-entropy, SGD by `pws.param_groups`, a schedule by step, an end to the run when the loss is not finite.

    `method` is asked for what it does to the gradients; None does nothing to them.
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
        self.test_metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(num_classes, average="micro"),
                "top5": MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro"),
            }
        )
        self.class_accuracy = MulticlassAccuracy(num_classes, average="none")
        self.test_loss = MeanMetric(nan_strategy="disable")  # the default would leave a batch of NaN out of the mean
        self._together: Together | None = None
        self.overflowing: str | None = None
        """The layer whose output overflowed first on the test images."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images."""
        logits: Tensor = self.model(images)
        return logits

    def on_fit_start(self) -> None:
        """Calibrate on the first step's batch, unless a resumed run carries its alpha in the checkpoint; from then on compute
        kernels together. Several processes exchange gradients as they come, which must not be all at the end."""
        if self.calibration != "none" and self.trainer.ckpt_path is None:
            self._calibrate()
        if self.trainer.world_size == 1 and any(isinstance(m, StandardizedLayer) for m in self.model.modules()):
            self._together = standardize_together(self.model)

    def on_fit_end(self) -> None:
        """Leave the model as it was."""
        if self._together is not None:
            self._together.remove()

    def _calibrate(self) -> None:
        loader = self.trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        precision = self.trainer.precision_plugin
        batches = [precision.convert_input(b) for b in islice(iter(loader), self.trainer.accumulate_grad_batches)]
        with precision.forward_context():
            self.calibrate_on(batches)

    def calibrate_on(self, batches: list[Any]) -> None:
        """Set alpha as the recipe says."""
        if self.calibration == "all":
            calibrate(self.model, batches)
            return
        assert isinstance(self.model, ResNet)  # check_calibration has seen to it
        layers = self.model.initalpha_layers()
        calibrate(self.model, batches, target=2.0, only=lambda _, layer: layer in layers)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """Mean cross-entropy of the batch."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels, label_smoothing=self.optim.label_smoothing)
        mean = _mean_over_processes(loss)
        if not torch.isfinite(mean):
            self._explain(images)
        self.log("train_loss", mean, on_step=True, on_epoch=True, batch_size=len(labels))
        return loss

    def _explain(self, images: Tensor) -> None:
        """Raise what happened: the same error in all processes, of which perhaps only one has seen it."""
        bad = (~torch.isfinite(images).flatten(1).all(1)).nonzero().flatten().tolist()
        seen = _from_all_processes((bad, None if bad else first_non_finite(self.model, images)))
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
        logits = self(images).float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        self.test_metrics.update(logits, labels)
        self.class_accuracy.update(logits, labels)
        self.test_loss.update(losses)
        if self.overflowing is None and not torch.isfinite(losses).all():
            self.overflowing = first_non_finite(self.model, images)

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
        """The bound on the step's length, if there is one."""
        bound = self.optim.step_bound
        if bound == "method":
            bound = self.method.step_bound if self.method and self.optim.clip_norm is None else None
        return [] if bound is None else [ClipGrad(float(bound))]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """What the method does to the gradients."""
        if self.method is not None and self.method.gradients is not None:
            self.method.gradients(self.model, optimizer)

    def configure_optimizers(self) -> Any:
        """SGD over `pws.param_groups`, its rates multiplied by `lr_factor` after every step."""
        optim = self.optim
        groups = param_groups(
            self.model, lr=optim.lr, weight_decay=optim.weight_decay, scale_lr_factor=optim.scale_lr_factor
        )
        sgd = torch.optim.SGD(groups, momentum=optim.momentum, nesterov=optim.nesterov)
        steps = int(self.trainer.estimated_stepping_batches)
        loader = self.trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        steps_per_epoch = len(loader) // self.trainer.accumulate_grad_batches
        factor = lr_factor(optim, steps, steps_per_epoch)
        scheduler = torch.optim.lr_scheduler.LambdaLR(sgd, factor)
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


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
