"""Flags that say where the cells of a grid are trained, and how many at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from pws._errors import PwsError
from pws.bench.launcher import Launcher
from pws.cli.arguments import check_jobs


def add_launching(parser: ArgumentParser) -> None:
    """Add --jobs, --launcher and --slurm."""
    parser.add_argument(
        "--jobs", type=int, help="cells trained at a time; all cores, or all cells on slurm, if left out"
    )
    parser.add_argument(
        "--launcher",
        type=Literal["processes", "local", "slurm"],
        default="processes",
        help="where: processes of this command; a job of the cluster per cell (slurm); or the same jobs on this machine "
        "(local). Logs of jobs go to jobs/ below --out; Ctrl-C cancels them",
    )
    parser.add_argument(
        "--slurm",
        type=dict[str, list[str] | str],
        default={},
        metavar="OPTION",
        help="(slurm) options of submitit: --slurm.partition NAME --slurm.time MINUTES --slurm.cpus-per-task COUNT ...",
    )


def launching(parsed: Any, cells: int, out: Path) -> tuple[int, Launcher | None]:
    """The number of cells at a time, and what launches them: None is this command's own processes.

    Raises:
        PwsError: options of SLURM without it, or a number of jobs that can't be.
    """
    if parsed.slurm and parsed.launcher != "slurm":
        raise PwsError(
            f"--slurm.{next(iter(parsed.slurm))} is an option of --launcher slurm; got {parsed.launcher}. Give both or none."
        )
    if parsed.launcher == "slurm":
        jobs = cells if parsed.jobs is None else parsed.jobs
        if jobs < 1:
            raise PwsError(f"--jobs must be at least 1; got {jobs}.")
    else:
        jobs = (os.cpu_count() or 1) if parsed.jobs is None else parsed.jobs
        check_jobs(jobs)
    if parsed.launcher == "processes":
        return jobs, None
    options = {name.replace("-", "_"): _value(given) for name, given in parsed.slurm.items()}
    return jobs, Launcher(parsed.launcher, out / "jobs", options)


def _value(given: list[str] | str) -> Any:
    """A number or True where it is written as one; YAML would make 3600 of 1:00:00."""
    if isinstance(given, str) and given.isdecimal():
        return int(given)
    return True if given == "true" else given
