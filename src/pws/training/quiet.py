"""Silence what Lightning says about itself; what a run has to say, pws says."""

from __future__ import annotations

import logging
import warnings


def quiet_lightning() -> None:
    """For the command line and its own processes only: the library never touches the process's logging or warnings."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
