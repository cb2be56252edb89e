"""Loggers by name, beside metrics.csv and TensorBoard: Weights & Biases, MLflow."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger

from pws._errors import PwsError, reason_of
from pws._files import write_whole
from pws.training.callbacks import is_first_process
from pws.training.recipe import Recipe
from pws.training.run_folder import recipe_dict

PROJECT: Final = "pws"
RUN_ID: Final = "run_id"
"""The file with the id that the logger's service knows the run by: a resumed run goes on there."""

TRACKING: Final = "MLFLOW_TRACKING_URI"
Known = str | None
"""The id of a run that goes on; None for a new one."""


def _wandb(name: str, folder: Path, known: Known, *, quiet: bool) -> tuple[Logger, str]:
    import wandb

    logger = WandbLogger(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=name,
        save_dir=folder.parent,  # it makes a folder wandb/ there
        id=known,
        resume="allow",
        settings=wandb.Settings(silent=quiet),
    )
    return logger, str(logger.experiment.id)


def _mlflow(name: str, folder: Path, known: Known, *, quiet: bool) -> tuple[Logger, str]:
    given = os.environ.get(TRACKING)
    logger = MLFlowLogger(
        os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT),
        name,
        tracking_uri=given or f"sqlite:///{folder.resolve()}/mlflow.db",
        artifact_location=None if given else (folder / "artifacts").resolve().as_uri(),
        run_id=known,
    )
    found = str(logger.run_id)
    if given is None:
        os.environ.pop(TRACKING, None)  # MLflow sets it, and the process's next run has a store of its own
    return logger, found


LOGGERS: Final[dict[str, tuple[Callable[..., tuple[Logger, str]], str]]] = {
    "wandb": (_wandb, "Log in with `wandb login`, or set WANDB_MODE=offline: `wandb sync` sends the run later"),
    "mlflow": (
        _mlflow,
        "Set MLFLOW_TRACKING_URI to a server that is up, or unset it: the run's folder holds the store then",
    ),
}
"""Name to builder, and what to do if it fails."""


def named_loggers(recipe: Recipe, run: Path, *, quiet: bool) -> list[Logger]:
    """The recipe's logger in the first process, or none; its files lie in the run's folder, which has its id there.

    Raises:
        PwsError: its package is not installed, or its service refuses.
    """
    name = recipe.trainer.logger
    if name is None or not is_first_process():
        return []
    build, advice = LOGGERS[name]
    folder = run / name
    stored = folder / RUN_ID
    known = stored.read_text(encoding="ascii").strip() if stored.is_file() else None
    folder.mkdir(exist_ok=True)
    try:
        logger, found = build(recipe.name, folder, known, quiet=quiet)
    except ImportError as error:
        package = (error.name or name).partition(".")[0]
        raise PwsError(f"trainer.logger {name} needs {package}: pip install 'pws-torch[{name}]'.") from error
    except Exception as error:  # services fail in ways of their own
        raise PwsError(f"trainer.logger {name} can't start: {reason_of(error)}. {advice}.") from error
    if known is None:
        logger.log_hyperparams(recipe_dict(recipe))
        write_whole(stored, f"{found}\n")
    return [logger]


@contextmanager
def closed(trainer: Trainer) -> Iterator[None]:
    """End the run of Weights & Biases with the block, as failed if that fails; Lightning ends that of MLflow.

    A process has one run of Weights & Biases, and the next training would go on in it.
    """
    code = 1
    try:
        yield
        code = 0
    finally:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.finish(exit_code=code)
