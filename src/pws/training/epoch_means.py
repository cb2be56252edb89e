"""The means of an epoch's training losses."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class EpochMeans(Callback):
    """Log the mean of each training loss over the epoch's batches, as NAME_epoch.

    Lightning's own means begin anew where a run is resumed within an epoch. These go on: they are a part of the checkpoint.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.batches = 0

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add a batch, whose losses are those of all processes."""
        for name, loss in outputs["logged"].items():
            self.sums[name] = self.sums[name].to(loss) + loss if self.batches else loss
        self.batches += 1

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Log the means."""
        module.log_dict({f"{name}_epoch": total / self.batches for name, total in self.sums.items()})
        self.sums, self.batches = {}, 0

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"sums": self.sums, "batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.sums, self.batches = dict(state_dict["sums"]), state_dict["batches"]
