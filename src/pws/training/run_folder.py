"""The folder of a run: whether it is free, whose it is, and where an interrupted run goes on."""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml
from torch import nn

from pws._errors import PwsError, StoppedRunError
from pws._files import remove_partials, write_whole
from pws.training.callbacks import is_first_process
from pws.training.checkpoint_files import restore
from pws.training.checkpoints import (
    BEFORE,
    BEST,
    LAST,
    DamagedCheckpointError,
    read_checkpoint,
)
from pws.training.facts import DATA
from pws.training.metrics_file import MetricsFile, Row, rows_before
from pws.training.recipe import Recipe
from pws.training.recipe_file import RESULT, differing, load_recipe

RECIPE: Final = "recipe.yaml"
SUMMARY: Final = "summary.json"
LOCK: Final = ".lock"
CHECKPOINTS: Final = "checkpoints"


def recipe_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested dictionaries without the settings left out."""
    return {
        key: {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value
        for key, value in asdict(recipe).items()
    }


def _content(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe_dict(recipe), sort_keys=False)


def has_checkpoint(folder: Path) -> bool:
    """Whether a run goes on from a checkpoint, whole or not; what a kill left half-written is none."""
    return any((folder / CHECKPOINTS / name).exists() for name in (LAST, BEFORE, BEST))


@contextmanager
def claimed(folder: Path, recipe: Recipe, *, resume: bool) -> Iterator[None]:
    """Hold a run's folder for this process, which makes that of a new run; bad input before its first checkpoint unmakes it.

    Raises:
        PwsError: the folder of a new run exists or can't be made, there is none to resume, or another process trains in it.
    """
    if not is_first_process():
        yield
        return
    if not resume:
        _make(folder, recipe)
    elif not (folder / RECIPE).is_file():
        raise PwsError(
            f"--resume goes on with a run, but {folder / RECIPE} does not exist. Leave --resume out to start it."
        )
    with (folder / LOCK).open("a") as lock:
        _take(lock, folder)
        try:
            yield
        except StoppedRunError:
            raise
        except (Exception, SystemExit) as error:  # of the data, or of a model of others
            if not (resume or has_checkpoint(folder) or (folder / SUMMARY).exists()):
                shutil.rmtree(folder)  # it would block the next try
            elif isinstance(error, OSError):
                raise StoppedRunError(
                    f"the run stopped: {error.strerror or error}: {error.filename or folder}. Make room on the disk, or mend "
                    "what else is wrong there, and --resume goes on."
                ) from error
            raise


def _make(folder: Path, recipe: Recipe) -> None:
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise PwsError(
            f"the run folder {folder} exists, and nothing in it is overwritten. Go on with --resume, choose another "
            "--name, or remove the folder."
        ) from None
    except OSError as error:
        raise PwsError(f"cannot make the run folder {folder}: {error}. Choose another folder with --runs.") from error
    try:
        (folder / CHECKPOINTS).mkdir()
        write_whole(folder / RECIPE, _content(recipe))
    except OSError:
        shutil.rmtree(folder)
        raise


def _take(lock: Any, folder: Path) -> None:
    # lockf, not flock: loader processes would inherit that one, and hold it for a while after a kill.
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise PwsError(
            f"one process trains in a run's folder, and another one is at work in {folder}. Wait until it ends, or end it; "
            "its lock goes with it."
        ) from None
    except OSError:  # a file system without locks
        return


@dataclass
class Start:
    """Where a resumed run goes on."""

    checkpoint: Path | None = None
    """None: it has written none yet, and starts again."""
    step: int = 0
    epoch: int = 0
    batch: int = 0
    """Batches of this epoch that are done."""
    rows: list[Row] = field(default_factory=list)
    """The rows of metrics.csv before `step`."""
    notes: list[str] = field(default_factory=list)
    """What was found damaged, and is done without."""

    def place(self) -> str:
        """In words."""
        return f"epoch {self.epoch}" + (f", after {self.batch} batches" if self.batch else "")


def resume_from(folder: Path, recipe: Recipe, module: nn.Module) -> Start:
    """Where the unfinished run of this recipe goes on; everything is verified, and nothing changed.

    Raises:
        PwsError: the folder holds a finished run, or one of another recipe, or its checkpoints are not the network's or gone.
    """
    if is_first_process():
        check_goes_on(folder, recipe)
    start = _newest(folder / CHECKPOINTS, recipe, module)
    if not is_first_process():
        return start
    metrics = folder / MetricsFile.NAME
    start.rows, damaged = rows_before(metrics, start.step)
    if damaged:
        start.notes.append(f"{damaged} damaged line{'s' * (damaged > 1)} of {metrics} cut off")
    if start.checkpoint is None:
        _check_began(folder)
    return start


def check_goes_on(folder: Path, recipe: Recipe) -> None:
    """Raise `PwsError` if the folder holds a finished run, or one of another recipe."""
    _check_unfinished(folder)
    _check_same(folder / RECIPE, recipe)


def _check_unfinished(folder: Path) -> None:
    summary = folder / SUMMARY
    if not summary.exists():
        return
    try:
        status = json.loads(summary.read_bytes())["status"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PwsError(
            f"cannot read {summary}, which says how the run ended: {type(error).__name__}: {error}. Remove that file: "
            "--resume goes on from the checkpoints, and writes it again."
        ) from error
    if status == "finished":
        raise PwsError(f"the run in {folder} is finished: see {summary}. Train longer under another --name.")


def _check_same(stored: Path, recipe: Recipe) -> None:
    for key, (there, here) in differing(asdict(_stored(stored)), recipe, RESULT).items():
        raise PwsError(
            f"--resume goes on with the same recipe, but {key.split('.')[0]} differs from {stored}: {key} is {there} there, "
            f"{here} here. Resume with the run's own recipe, or start a run of another --name."
        )


def _stored(path: Path) -> Recipe:
    try:
        return load_recipe(path)
    except (PwsError, OSError) as error:
        raise PwsError(
            f"cannot read the run's recipe, {path} holds no recipe: {error} Write there the recipe that the run was started "
            "with, and resume again."
        ) from error


def _newest(folder: Path, recipe: Recipe, module: nn.Module) -> Start:
    """The newest checkpoint that is as it was written; all processes find the same one."""
    names = (LAST, BEFORE, BEST)
    damage: list[DamagedCheckpointError] = []
    for path in (folder / name for name in names if (folder / name).exists()):
        try:
            checkpoint = read_checkpoint(path, module, recipe, resume=True)
        except DamagedCheckpointError as error:
            damage.append(error)
            continue
        start = _start(path, checkpoint, recipe)
        if path.name != LAST:
            why = damage[0].reason if damage else f"{folder / LAST} does not exist."
            start.notes.append(f"{why} Going on from {path}, {start.place()}.")
        return start
    if damage:
        raise damage[0]
    return Start()


def _start(path: Path, checkpoint: dict[str, Any], recipe: Recipe) -> Start:
    """Where a checkpoint's run goes on: with the next epoch, or within the present one."""
    step, epoch = checkpoint["global_step"], checkpoint["epoch"]
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    if progress["is_last_batch"]:
        return Start(path, step, epoch + 1)
    there, here = checkpoint["recipe"]["trainer"]["accumulate"], recipe.trainer.accumulate
    if there != here:
        raise PwsError(
            f"{path} was written within an epoch, of steps that trainer.accumulate divides in {there}; this recipe has {here}. "
            f"Resume with --trainer.accumulate {there}; from the epoch's end on it may change."
        )
    return Start(path, step, epoch, progress["current"]["ready"])


def _check_began(folder: Path) -> None:
    """Raise `PwsError` if a run without a checkpoint must have written one: its second epoch began, or their folder went."""
    rows, _ = rows_before(folder / MetricsFile.NAME, sys.maxsize)
    if (folder / CHECKPOINTS).is_dir() and not any(float(row.get("epoch", 0)) >= 1 for row in rows):
        return
    raise PwsError(
        f"--resume goes on from a checkpoint, and those of {folder} are gone: {folder / CHECKPOINTS / LAST} does not exist. "
        "Put the folder back, or start a run of another --name."
    )


def take_up(folder: Path, recipe: Recipe) -> None:
    """Make a verified folder that of the resumed run: what a kill left half-written goes, the recipe is the present one."""
    for name in (RECIPE, DATA, SUMMARY, MetricsFile.NAME, *(f"{CHECKPOINTS}/{name}" for name in (LAST, BEFORE, BEST))):
        remove_partials(folder / name)
    restore(folder / CHECKPOINTS / BEST)
    if _stored(folder / RECIPE) != recipe:
        write_whole(folder / RECIPE, _content(recipe))
