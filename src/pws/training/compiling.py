"""`trainer.compile`: the network's passes in training by torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from pws._errors import PwsError, reason_of


class Compile(Callback):
    """Compile `module.model` in place: its parameters keep their names, and checkpoints are those of the plain network."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Behind the calibration, which looks into the network.

        Raises:
            PwsError: nothing can be compiled on this machine.
        """
        try:
            torch.compile(_probe)(torch.zeros(2, device=module.device))
        except Exception as error:  # of the compiler
            raise PwsError(
                f"trainer.compile: torch can't compile here: {reason_of(error)}. It takes a C++ compiler on the CPU (g++, or "
                "the one in CXX), Triton on a GPU. Install it, or leave trainer.compile out."
            ) from error
        network: Any = module.model
        network.compile()


def _probe(numbers: torch.Tensor) -> torch.Tensor:
    return numbers + 1
