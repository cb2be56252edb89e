"""A classifier in private training: each image's gradient is clipped, noise is added, and the privacy spent is counted."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from pws._mark import marked
from pws._preserve import random_state
from pws.training.classifier import Classifier
from pws.training.optimizer import build_optimizer, step_bound
from pws.training.private.config import PrivacyConfig
from pws.training.private.engine import Accounting, check_trainable
from pws.training.private.spent import Spent


class PrivateClassifier(Classifier):
    """Takes a step in parts of the physical batch size; Opacus' optimizer adds them up before the noise.

    The bound on the step holds behind the noise. A rule of the method on the gradients (nf's clipping) is left out: each
    image's clipping takes its place.
    """

    def __init__(self, *args: Any, privacy: PrivacyConfig, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.privacy, self.automatic_optimization = privacy, False
        self.accounting = Accounting(privacy)
        check_trainable(self.model, "none" if self.method is None else self.method.name)

    def built_optimizer(self) -> Optimizer:
        """Opacus' around the recipe's."""
        bound = step_bound(self.optim, self.method)
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        loss = nn.CrossEntropyLoss(label_smoothing=self.optim.label_smoothing)
        sizes = len(data.splits.train), data.config.batch_size, int(self.trainer.estimated_stepping_batches)
        inner = build_optimizer(self.model, self.optim, bound)
        private, self.criterion = self.accounting.attach(self.model, inner, loss, *sizes)
        if bound is not None and not marked(self.model):  # an optimizer of pws.optim bounds its steps itself
            import_module("pws.private").bound_steps(self.model, private, bound)
        optimizer: Optimizer = private
        return optimizer

    def configure_callbacks(self) -> list[Callback]:
        """None: the bound is held behind the noise."""
        return []

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Nothing: here the gradients are not private yet."""

    def calibrate_on(self, batches: list[Any]) -> None:
        """Scale the kernels on noise: what is set from private images is not accounted for."""
        images = batches[0][0]
        super().calibrate_on([torch.randn(64, *images.shape[1:], dtype=images.dtype)])

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> dict[str, Any]:
        """Clip and add up the gradients part by part, then take the step."""
        self._batch, self._rewind = batch, random_state(self.model)
        images, labels = batch
        optimizer: Any = self.optimizers()
        private, losses = optimizer.optimizer, []
        size = self.privacy.physical_batch_size // self.privacy.augmentations * self.privacy.augmentations
        parts = list(zip(images.split(size), labels.split(size), strict=True))
        for number, part in enumerate(parts):
            private.zero_grad()
            loss = self.criterion(self(part[0]), part[1])
            losses.append(loss.detach() * len(part[0]) if len(part[0]) else torch.zeros((), device=self.device))
            loss.backward()
            self._average_copies()
            private.signal_skip_step(number < len(parts) - 1)
            # In bf16-mixed Opacus' sums would be rounded, and with them what noise and clipping are measured by.
            with self.explained(), torch.autocast(self.device.type, enabled=False):
                (private if number < len(parts) - 1 else optimizer).step()
        self.lr_schedulers().step()  # type: ignore[union-attr]
        loss = torch.stack(losses).sum() / max(1, len(images))
        return {"loss": loss, "logged": self.log_losses(batch, loss, {})}

    def _average_copies(self) -> None:
        """The gradient of an image is the mean of those of its augmented copies, which stand beside each other.

        In the parameter's precision: of rounded gradients the norms, and so the clipping, would be rounded too.
        """
        for parameter in self.model.parameters():
            samples: Any = getattr(parameter, "grad_sample", None)
            if samples is None:
                continue
            samples = samples.to(parameter.dtype)
            if self.privacy.augmentations > 1:
                samples = samples.unflatten(0, (-1, self.privacy.augmentations)).mean(1)
            parameter.grad_sample = samples  # type: ignore[attr-defined]

    def spent(self) -> Spent:
        """The privacy spent until now."""
        return self.accounting.spent()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """With the privacy spent."""
        checkpoint["privacy"] = self.accounting.engine.accountant.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting from there."""
        self.accounting.engine.accountant.load_state_dict(checkpoint["privacy"])
