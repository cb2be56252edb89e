"""What is stored of a federated run, verified before anything is done with it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from pws._errors import PwsError
from pws.federated.federation import Federation, State
from pws.federated.results import Progress
from pws.federated.strategies import Moments
from pws.training.checkpoint_writers import CheckpointFiles
from pws.training.checkpoints import BEFORE, LAST, DamagedCheckpointError, read_checkpoint
from pws.training.metrics_file import MetricsFile, Row, rows_before
from pws.training.run_folder import CHECKPOINTS

KEY: Final = "federated"
"""Of what a checkpoint has beside those of `pws train`."""
MODEL: Final = "model."
"""What the names of the network's tensors begin with in a checkpoint."""


@dataclass
class Stored:
    """Where a run goes on."""

    state: State
    """The averaged weights."""
    progress: Progress = field(default_factory=Progress)
    moments: Moments = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    """Those of metrics.csv for the rounds that are done."""
    notes: list[str] = field(default_factory=list)
    """What was found damaged, and is done without."""


def store(federation: Federation, path: Path, number: int, progress: Progress, moments: Moments) -> None:
    """Write the module's weights after round `number` as a checkpoint, which `pws evaluate`, `export` and `predict` read."""
    content = {
        "state_dict": {key: value.cpu() for key, value in federation.module.state_dict().items()},
        **{"epoch": number, "global_step": number},
        KEY: {"progress": asdict(progress), "moments": moments},
    }
    CheckpointFiles(federation.recipe).save_checkpoint(content, path)


def stored_in(folder: Path, federation: Federation) -> Stored:
    """What the last round has left; of a damaged last one, what the round before it has; the start where there is none.

    Raises:
        PwsError: all checkpoints are damaged or gone, or of another network or program; or metrics.csv can't be read.
    """
    found, notes = _newest(folder / CHECKPOINTS, federation)
    if found is None:
        rows, _ = rows_before(folder / MetricsFile.NAME, sys.maxsize)
        if any(int(row["step"]) > 1 for row in rows):
            raise PwsError(
                f"--resume goes on from a checkpoint, and those of {folder} are gone: {folder / CHECKPOINTS / LAST} does not "
                "exist. Put the folder back, or start a run of another --name."
            )
        return Stored(dict(federation.initial))
    progress = Progress(**found[KEY]["progress"])
    rows, _ = rows_before(folder / MetricsFile.NAME, progress.number + 1)
    return Stored(weights_in(found), progress, found[KEY]["moments"], rows, notes)


def weights_in(checkpoint: Mapping[str, Any]) -> State:
    """The network's state in a checkpoint."""
    held: Mapping[str, Any] = checkpoint["state_dict"]
    return {name.removeprefix(MODEL): value for name, value in held.items()}


def _newest(folder: Path, federation: Federation) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest checkpoint that is as it was written, and what was wrong with a newer one."""
    damage: list[DamagedCheckpointError] = []
    for path in (folder / name for name in (LAST, BEFORE) if (folder / name).exists()):
        try:
            found = read_checkpoint(path, federation.module, federation.recipe)
        except DamagedCheckpointError as error:
            damage.append(error)
            continue
        if KEY not in found:
            raise PwsError(f"{path} is not a checkpoint of pws federate: put the file back that the run wrote.")
        return found, [f"{error.reason} Going on from {path}." for error in damage]
    if damage:
        raise damage[0]
    return None, []
