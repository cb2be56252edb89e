"""The means of an epoch's training losses."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, distributed


class EpochMeans(Callback):
    """Log the mean of each training loss over the epoch's images, as NAME_epoch.

    Lightning's own means begin anew where a run is resumed within an epoch. These go on: they are a part of the checkpoint.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        """Loss times images, and images `(2,)`, of this process."""

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add a batch."""
        images = len(batch[0])
        for name, loss in outputs["logged"].items():
            new = torch.stack([loss * images, loss.new_tensor(images)])
            self.sums[name] = self.sums[name].to(new) + new if name in self.sums else new

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Log the means over all processes."""
        if not self.sums:
            return
        sums = torch.stack(list(self.sums.values()))
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
        means = sums[:, 0] / sums[:, 1]
        module.log_dict({f"{name}_epoch": mean for name, mean in zip(self.sums, means, strict=True)})
        self.sums = {}

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"sums": self.sums}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.sums = dict(state_dict["sums"])
