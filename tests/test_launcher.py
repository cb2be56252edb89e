"""Cells as jobs: submitit on this machine, and on a SLURM that is played by scripts."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from fake_slurm import install

from pws._errors import PwsError
from pws.bench.launcher import Launcher
from pws.bench.processes import Failure
from pws.cli import main

submitit = pytest.importorskip("submitit")
GRID = """
settings:
  model: {name: allconv, width: 0.08}
  data: {name: digits, image_size: 16, train_images: 64, batch_size: 32}
  trainer: {max_steps: 1}
columns:
  - {optim.lr: 0.1}
rows:
  none: {seeds: [0, 1]}
  pws: {seeds: [0, 1]}
"""


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    # submitit waits 15 s for the file of a job that has ended: that of a killed one never comes.
    monkeypatch.setattr(submitit.Job, "_results_timeout_s", 0)


def launcher(cluster: Literal["local", "slurm"], tmp_path: Path, **options: Any) -> Launcher:
    return Launcher(cluster, tmp_path / "jobs", options, wait=0.1)


def caller() -> Callable[..., Any]:
    def call(function: Callable[..., Any], *arguments: Any) -> Any:  # goes to the job as it is, without this module
        return function(*arguments)

    return call


def alive(text: str) -> list[str]:
    """The processes whose command holds the text."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_text()
        except OSError:
            continue
        found += [command] if text in command else []
    return found


@pytest.mark.parametrize("cluster", ["local", "slurm"])
def test_each_job_ends_in_its_own_way(
    cluster: Literal["local", "slurm"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = install(tmp_path / "bin", monkeypatch)
    tasks: dict[str, tuple[Any, ...]] = {"root": (math.sqrt, 4), "wrong": (int, "x"), "killed": (os._exit, 3)}
    options = {"partition": "long", "time": 60, "cpus_per_task": 2} if cluster == "slurm" else {}
    found = dict(launcher(cluster, tmp_path, **options).each(caller(), tasks, 3, dict))
    assert found.pop("root") == 2
    reasons = {key: outcome.reason for key, outcome in found.items() if isinstance(outcome, Failure)}
    assert set(reasons) == {"wrong", "killed"}
    assert "invalid literal" in reasons["wrong"]
    assert "ended without a result" in reasons["killed"]
    logs = {key: Path(reason.rpartition("its log is ")[2]) for key, reason in reasons.items()}
    assert {log.parent for log in logs.values()} == {tmp_path / "jobs"}
    assert "Traceback" in logs["wrong"].read_text()
    assert logs["killed"].is_file()
    if cluster == "slurm":
        script = next(scripts.glob("*.sh")).read_text()
        for line in ("--partition=long", "--time=60", "--cpus-per-task=2", "--array=0-2%3"):
            assert f"#SBATCH {line}\n" in script


@pytest.fixture
def _in_the_background() -> Iterator[None]:
    """SIGINT as a shell's background jobs find it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.SIG_IGN


@pytest.mark.usefixtures("_in_the_background")
@pytest.mark.parametrize("cluster", [pytest.param("local", marks=pytest.mark.slow), "slurm"])
def test_what_is_wrong_with_the_input_ends_all(
    cluster: Literal["local", "slurm"],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    install(tmp_path / "bin", monkeypatch)
    tasks: dict[int, tuple[Any, ...]] = {1: (Launcher, "local", tmp_path, {"nodes": 2}), 2: (time.sleep, 600)}
    with pytest.raises(PwsError, match=r"--slurm\.nodes must be 1"):
        list(launcher(cluster, tmp_path).each(caller(), tasks, 2, dict))
    end = time.monotonic() + 10
    while alive(str(tmp_path / "jobs")) and time.monotonic() < end:
        time.sleep(0.1)
    assert not alive(str(tmp_path / "jobs"))
    assert capfd.readouterr().err == ""


class SlowJob:
    """Ends at the second look."""

    def __init__(self) -> None:
        self.looks, self.job_id, self.paths = 0, "1", submitit.core.utils.JobPaths("jobs", "1")

    def done(self) -> bool:
        self.looks += 1
        return self.looks > 1

    def result(self) -> tuple[bool, int]:
        return False, self.looks


def test_so_many_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def submitted(_: object, tasks: dict[int, Any]) -> dict[int, SlowJob]:
        sizes.append(len(tasks))
        return {key: SlowJob() for key in tasks}

    monkeypatch.setattr("pws.bench.launcher._submitted", submitted)
    found = dict(Launcher("local", tmp_path / "jobs", wait=0.0).each(int, dict.fromkeys(range(5), ()), 2, dict))
    assert found == dict.fromkeys(range(5), 2)
    assert sizes == [2, 0, 2, 0, 1, 0]


def without_srun(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("PATH", "")


def without_submitit(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "submitit", None)


def refused_by_sbatch(patch: pytest.MonkeyPatch) -> None:
    sbatch = Path(os.environ["PATH"].split(os.pathsep)[0]) / "sbatch"
    sbatch.write_text("#!/bin/bash\necho 'sbatch: error: invalid partition specified: none' >&2; exit 1\n")


def nothing(_: pytest.MonkeyPatch) -> None: ...


@pytest.mark.parametrize(
    ("flags", "change", "message"),
    [
        (["--launcher=local"], without_submitit, "--launcher local needs submitit: pip install 'pws-torch[cluster]'."),
        (["--launcher=slurm"], without_srun, 'Could not detect "srun"'),
        (["--launcher=slurm", "--slurm.partition=none"], refused_by_sbatch, "invalid partition specified"),
        (["--launcher=slurm", "--slurm.partitoin=long"], nothing, "Unknown argument 'partitoin'"),
        (["--launcher=slurm", "--slurm.time=1:00:00"], nothing, "--slurm.time is a number of minutes; got '1:00:00'"),
        (["--launcher=slurm", "--slurm.tasks-per-node=2"], nothing, "--slurm.tasks_per_node must be 1"),
        (["--launcher=slurm", "--jobs=0"], nothing, "--jobs must be at least 1; got 0"),
        (["--slurm.partition=long"], nothing, "--slurm.partition is an option of --launcher slurm; got processes"),
        (["--launcher=pbs"], nothing, "launcher"),
    ],
)
def test_what_can_not_be_launched(
    flags: list[str],
    change: Callable[[pytest.MonkeyPatch], None],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    install(tmp_path / "bin", monkeypatch)
    change(monkeypatch)
    grid = tmp_path / "small.yaml"
    grid.write_text(GRID)
    assert main(["bench", "accuracy", str(grid), f"--out={tmp_path / 'out'}", *flags]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.startswith("pws: ")
    assert error.count("\n") == 1
    assert not list((tmp_path).glob("out/*.json"))


@pytest.mark.slow
def test_the_cells_are_those_of_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "bin", monkeypatch)
    grid = tmp_path / "small.yaml"
    grid.write_text(GRID)
    cells = {}
    for where in ("processes", "local"):
        path = tmp_path / where / "small.json"
        arguments = ["bench", "accuracy", str(grid), f"--out={path.parent}", "--jobs=2"]
        assert main([*arguments, f"--launcher={where}"]) == 0
        cells[where] = json.loads(path.read_text())["cells"]
    assert len(cells["local"]) == 4
    assert cells["local"] == cells["processes"]
    path.write_text(json.dumps({**json.loads(path.read_text()), "cells": cells["local"][:3]}))
    assert main([*arguments, "--launcher=slurm"]) == 0  # goes on with the cell that is missing
    assert json.loads(path.read_text())["cells"] == cells["processes"]
    assert len(list((path.parent / "jobs").glob("*_result.pkl"))) == 5
