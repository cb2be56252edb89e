"""Silence what Lightning says about itself; what a run has to say, pws says. A Trainer that only trains."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer


def quiet_lightning() -> None:
    """For the command line and its own processes only: the library never touches the process's logging or warnings."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    # Opacus' hooks in a private run.
    warnings.filterwarnings("ignore", message="Full backward hook is firing|grad and param do not obey")
    warnings.filterwarnings("ignore", module=r"opacus\..*")
    threading.excepthook = _quiet_writer


def _quiet_writer(failed: threading.ExceptHookArgs) -> None:
    """TensorBoard's writing thread raises a full disk's error in the main thread again."""
    if not isinstance(failed.exc_value, OSError):
        threading.__excepthook__(failed)


def bare_trainer(**settings: Any) -> Trainer:
    """A Trainer of one device that logs, stores and shows nothing."""
    return Trainer(
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **settings,
    )


@contextmanager
def real_interrupts() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt again, where Lightning makes a SystemExit of it."""
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
