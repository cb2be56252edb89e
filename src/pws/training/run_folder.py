"""The folder of a run: whether it is free, where its last checkpoint is, how its metrics go on."""

from __future__ import annotations

import csv
import json
import pickle
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from pws.errors import PwsError
from pws.training.callbacks import is_first_process
from pws.training.recipe import Recipe


def recipe_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested dictionaries without the settings left out."""
    return {
        key: {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value
        for key, value in asdict(recipe).items()
    }


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of `pws train`, tensors and plain values only (`weights_only=True`).

    Raises:
        PwsError: there is no such file, or it is not a checkpoint or cut off.
    """
    if not path.is_file():
        raise PwsError(
            f"the checkpoint {path} does not exist. A run writes its first one at the end of its first epoch."
        )
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["state_dict"], checkpoint["global_step"], checkpoint["epoch"]  # it has what we use
    except (RuntimeError, pickle.UnpicklingError, BadZipFile, EOFError, KeyError, TypeError, OSError) as error:
        raise PwsError(f"{path} is not a checkpoint of pws train, or is cut off ({str(error)[:200]}).") from error
    return checkpoint


def resume_from(folder: Path, recipe: Recipe) -> Path | None:
    """The last checkpoint of an unfinished run of this recipe; None if it has not written one.

    Raises:
        PwsError: the folder holds no run, a finished one, or one of another recipe.
    """
    last, stored, summary = folder / "checkpoints" / "last.ckpt", folder / "recipe.yaml", folder / "summary.json"
    if not is_first_process():  # the first one checks, and may be writing there now
        return last if last.is_file() else None
    try:
        settings = yaml.safe_load(stored.read_text())
        finished = summary.is_file() and json.loads(summary.read_text())["status"] == "finished"
    except FileNotFoundError:
        raise PwsError(
            f"--resume goes on with a run, but {stored} does not exist. Leave --resume out to start it."
        ) from None
    except (OSError, ValueError, KeyError, yaml.YAMLError) as error:
        raise PwsError(f"cannot read {stored} and summary.json beside it: {error}. Start the run again.") from error
    if not isinstance(settings, dict):
        raise PwsError(f"{stored} holds no recipe: it is damaged. Start the run again.")
    if finished:
        raise PwsError(f"the run in {folder} is finished: see {summary}. Train longer under another --name.")
    wanted = recipe_dict(recipe)
    # Devices, precision and the like may change between sessions; what the result depends on may not.
    ends = [{key: part.get("trainer", {}).get(key) for key in ("epochs", "max_steps")} for part in (settings, wanted)]
    compared = [(part, settings.get(part), wanted[part]) for part in ("seed", "model", "data", "optim")]
    for part, old, new in [*compared, ("trainer", *ends)]:
        if old != new:
            raise PwsError(
                f"--resume goes on with the same recipe, but {part} differs from {stored}: {old} there, {new} here. "
                "Resume with the run's own recipe, or start a run of another --name."
            )
    return last if last.is_file() else None


def claim(folder: Path, recipe: Recipe) -> None:
    """Make the folder and write the recipe into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PwsError(f"cannot make the run folder {folder}: {error}. Choose another folder with --runs.") from error
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_dict(recipe), sort_keys=False))


def metrics_logger(folder: Path, step: int) -> CSVLogger:
    """Lightning's logger, which deletes what is there: the rows before `step`, where a resumed run goes on, are kept."""
    logger = CSVLogger(folder, name="", version="")
    if is_first_process():
        old, kept = folder / "metrics.csv", []
        if old.is_file():
            with old.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) < step]
            old.unlink()
        with warnings.catch_warnings():  # it warns of deleting what is in the folder; there is no metrics.csv any more
            warnings.simplefilter("ignore")
            writer = logger.experiment
        writer.metrics.extend({k: v for k, v in row.items() if v != ""} for row in kept)
        writer.save()
    return logger
