"""How a run's checkpoints are written: whole and with a checksum, the last but one kept."""

from __future__ import annotations

from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from pws._files import written_whole
from pws.training.checkpoint_files import make_way, tidy
from pws.training.checkpoints import BEST, CHECKSUM, LAST, checksum_of, load_checkpoint
from pws.training.recipe import Recipe, TrainerConfig


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's way to store checkpoints, but whole, with the recipe and a checksum, and `before.ckpt` kept."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write it; a process that ends here leaves the old one or the new one."""
        path, buffer = Path(path), BytesIO()
        content = {**checkpoint, "recipe": asdict(self.recipe)}
        torch.save({**content, CHECKSUM: checksum_of(content)}, buffer)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as partial:
            partial.write_bytes(buffer.getbuffer())
            make_way(path, folder=False)
        tidy(path)

    def load_checkpoint(self, path: Any, *args: Any, **settings: Any) -> dict[str, Any]:
        """Read it, of one process or of several."""
        return load_checkpoint(Path(path))


class BestCheckpoint(ModelCheckpoint):
    """Lightning's `best.ckpt` by `score`; a resumed run whose folder was moved still knows how good it is."""

    def __init__(self, folder: Path, score: str, **settings: Any) -> None:
        super().__init__(folder, filename=Path(BEST).stem, monitor=score, mode="max", **settings)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint; Lightning's own would forget the best score with another folder."""
        there, here = str(state_dict["dirpath"]), str(self.dirpath)

        def moved(path: str) -> str:
            return here + path.removeprefix(there) if path.startswith(there) else path

        paths = {key: moved(state_dict[key]) for key in state_dict if key.endswith("_path")}
        best = {moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": best, "dirpath": here})


class StepCheckpoint(ModelCheckpoint):
    """`last.ckpt` within an epoch, after so many steps of the optimizer; the epoch's end has one of its own."""

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Store after a whole step: accumulated gradients are in no checkpoint."""
        whole = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if whole and batch_idx + 1 < trainer.num_training_batches:
            super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)


def checkpoint_callbacks(folder: Path, config: TrainerConfig, score: str | None) -> list[Callback]:
    """What stores a run's checkpoints; the best one by `score`, if there is one."""
    # Behind the validation: a checkpoint is the end of a whole epoch. Lightning's own `save_last` would store only those
    # epochs that are better than all before.
    keep: dict[str, Any] = {"save_on_train_epoch_end": True, "enable_version_counter": False}
    name = Path(LAST).stem
    found: list[Callback] = [] if score is None else [BestCheckpoint(folder, score, **keep)]
    found.append(ModelCheckpoint(folder, filename=name, **keep))
    if config.checkpoint_steps is not None:
        keep = {"every_n_train_steps": config.checkpoint_steps, "enable_version_counter": False}
        found.append(StepCheckpoint(folder, filename=name, **keep))
    return found
