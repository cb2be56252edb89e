"""All models, in parallel processes, each stored when it is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.convert.check import LR, STEPS, Checked, check_model
from benchmarks.convert.detectors import DETECTORS, check_detector
from benchmarks.convert.models import SPECS
from pws.bench.processes import Failure, each_apart
from pws.bench.result_file import Result, commit, read_result, rounded, write_result

Stored = dict[str, Any]
ALL: Final = (*SPECS, *DETECTORS)
"""Names, in the order of the table."""


@dataclass
class StoredModel:
    """What is kept of a model."""

    parameters: int
    standardized: int
    removed: int
    kept_norms: int
    losses: list[float]
    """The losses of the first and the last step; of a detector, on the same images before and after its steps."""
    fold_difference: float | None
    failures: list[str]
    not_run: str | None
    commit: str


def stored_model(checked: Checked) -> Stored:
    """The fields of `StoredModel`, as plain values."""
    losses = [checked.losses[0], checked.losses[-1]] if checked.losses else []
    difference = checked.fold_difference
    stored = StoredModel(
        parameters=checked.parameters,
        standardized=checked.standardized,
        removed=checked.removed,
        kept_norms=len(checked.kept_norms),
        losses=[rounded(loss, 8) for loss in losses],
        fold_difference=None if difference is None else rounded(difference),
        failures=checked.failures,
        not_run=checked.not_run,
        commit=checked.commit,
    )
    return asdict(stored)


def check(spec: str) -> Checked:
    """The check of a classifier, or of a detector."""
    return check_detector(spec) if spec in DETECTORS else check_model(spec)


def run_conversions(
    specs: Sequence[str], path: Path, command: str, jobs: int, listen: Callable[[str, Stored, int], None]
) -> Result:
    """Check what `path` does not hold yet; returns the content of `path`, which keeps the other models that it holds.

    `listen` is given a model's name, what became of it, and how many are done. A model whose process dies has that failure.
    """
    known: dict[str, Stored] = (read_result(path, "models", dict, StoredModel) or {"models": {}})["models"]
    tasks = {spec: (spec,) for spec in specs if spec not in known}
    done = len(specs) - len(tasks)
    for spec, outcome in each_apart(check, tasks, jobs):
        checked = Checked(0, failures=[outcome.reason], commit=commit()) if isinstance(outcome, Failure) else outcome
        known[spec] = stored_model(checked)
        _write(path, command, known)
        done += 1
        listen(spec, known[spec], done)
    return _write(path, command, known)


def _write(path: Path, command: str, known: dict[str, Stored]) -> Result:
    models = {spec: known[spec] for spec in ALL if spec in known}
    run = [model for model in models.values() if not model["not_run"]]
    passed = sum(not model["failures"] for model in run)
    content = {"steps": STEPS, "lr": LR, "run": len(run), "passed": passed, "models": models}
    return write_result(path, command, content)
