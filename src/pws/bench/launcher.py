"""Work as jobs of a cluster, by submitit: on SLURM, or in processes of this machine as a rehearsal of that."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from pws._errors import PwsError, one_line
from pws.bench.processes import Failure, outcome_of

Key = TypeVar("Key")
Cluster = Literal["local", "slurm"]
DAY: Final = 24 * 60
"""Minutes that a job may take if nothing else is said."""
ONE_TASK: Final = ("nodes", "tasks_per_node", "ntasks_per_node")


@dataclass(frozen=True)
class Launcher:
    """A job per task, with its log in `folder`; `options` are submitit's for SLURM, such as partition or cpus_per_task.

    Raises:
        PwsError: an option asks for several processes, or the time is not in minutes.
    """

    cluster: Cluster
    folder: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    wait: float = 1.0
    """Seconds between two looks at the jobs."""

    def __post_init__(self) -> None:
        for name in ONE_TASK:
            if self.options.get(name, 1) != 1:
                raise PwsError(
                    f"--slurm.{name} must be 1: a job is one process; got {self.options[name]}. Leave it out."
                )
        if not isinstance(self.options.get("time", DAY), int):
            raise PwsError(f"--slurm.time is a number of minutes; got {self.options['time']!r}.")

    def each(
        self, function: Callable[..., Any], tasks: Mapping[Key, tuple[Any, ...]], jobs: int, setup: Callable[[], Any]
    ) -> Iterator[tuple[Key, Any]]:
        """Do `function(*arguments)` for each task, `jobs` at a time; yields each with its result or its `Failure`, as they end.

        Jobs that are under way when the caller ends are cancelled.

        Raises:
            PwsError: submitit or SLURM is missing or refuses an option, or what a task was given is wrong.
        """
        waiting, busy = deque(tasks.items()), dict[Key, Any]()
        executor = self._executor() if tasks else None
        try:
            while waiting or busy:
                chosen = [waiting.popleft() for _ in range(min(jobs - len(busy), len(waiting)))]
                busy |= _submitted(executor, {key: (setup, function, arguments) for key, arguments in chosen})
                ended = [key for key, job in busy.items() if job.done()]
                for key in ended:
                    yield key, _result(busy.pop(key))
                if not ended:
                    time.sleep(self.wait)
        finally:
            for job in busy.values():
                job.cancel(check=False)

    def _executor(self) -> Any:
        try:
            from submitit import AutoExecutor
        except ImportError as error:
            raise PwsError(f"--launcher {self.cluster} needs submitit: pip install 'pws-torch[cluster]'.") from error
        options = {f"slurm_{name}": value for name, value in self.options.items()}
        try:
            executor = AutoExecutor(self.folder, cluster=self.cluster)
            executor.update_parameters(name="pws", timeout_min=DAY, **options)
        except (RuntimeError, NameError, ValueError, AssertionError, TypeError) as error:
            raise PwsError(
                f"submitit refuses --launcher {self.cluster}{' with these options' if options else ''}: {one_line(error)} "
                "(--launcher local rehearses it without SLURM)"
            ) from error
        return executor


def _submitted(executor: Any, tasks: Mapping[Key, tuple[Any, ...]]) -> dict[Key, Any]:
    """A job for each task; several are one job array."""
    if not tasks:
        return {}
    try:
        with _stderr_to(executor.folder / "submission.log"), _interruptible(), executor.batch():
            return {key: executor.submit(_in_job, *task) for key, task in tasks.items()}
    except RuntimeError as error:
        raise PwsError(
            f"no job can be submitted ({one_line(error)}). Mend the options that start with --slurm."
        ) from error


@contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    """Keep off the terminal what submitit and its processes say, such as where Ctrl-C has found them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    terminal = os.dup(2)
    try:
        with path.open("a") as file, redirect_stderr(file):
            os.dup2(file.fileno(), 2)
            yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let what starts here end at SIGINT, by which submitit cancels.

    A shell's background job ignores it, and so would its children.
    """
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _in_job(setup: Callable[[], Any], function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    setup()
    return outcome_of(_logged, (function, arguments))


def _logged(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        return function(*arguments)
    except Exception:
        traceback.print_exc()
        raise


def _result(job: Any) -> Any:
    """What an ended job has computed, or the `Failure`, which names its log."""
    log = f"its log is {job.paths.stderr}"
    try:
        refused, outcome = job.result()
    except RuntimeError:
        return Failure(f"job {job.job_id} ended without a result ({job.state}), as one that was killed; {log}")
    if refused:
        raise PwsError(outcome)
    return Failure(f"{outcome.reason}; {log}") if isinstance(outcome, Failure) else outcome
