"""Work in processes of its own: what dies there is one failed task, whose reason is told.

`concurrent.futures` breaks the whole pool when one process dies, or when an error can't be pickled.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from threading import Thread
from typing import Any, Final, TypeVar

import torch

from pws._error_messages import frames_of_others, reason_with_frame
from pws._errors import PwsError

Key = TypeVar("Key")
# A forked process would inherit torch's thread pool in an unknown state.
CONTEXT: Final = get_context("spawn")


@dataclass(frozen=True)
class Failure:
    """Why a task has no result."""

    reason: str


class TaskError(PwsError):
    """A task failed in its process, or with it."""


class Worker:
    """A process that does one task after the other, `setup` first of all."""

    def __init__(self, setup: Callable[[], Any]) -> None:
        self.connection, there = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_serve, args=(there, setup))
        self._process.start()
        there.close()  # or the end of the process would not be seen

    def send(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Give it a task."""
        with suppress(OSError):  # it is dead already, as `receive` will say
            self.connection.send((function, arguments))

    def receive(self) -> Any:
        """Wait for the result of the task, or the `Failure`.

        Raises:
            PwsError: what the task was given is wrong: it would be wrong for every process.
        """
        try:
            error, outcome = self.connection.recv()
        except (EOFError, OSError):
            return Failure(self._end())
        if error:
            raise PwsError(outcome)
        return outcome

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Do a task and wait; raise `TaskError` where it fails."""
        self.send(function, *arguments)
        outcome = self.receive()
        if isinstance(outcome, Failure):
            raise TaskError(outcome.reason)
        return outcome

    @property
    def alive(self) -> bool:
        """Whether it can take another task."""
        return self._process.is_alive()

    def _end(self) -> str:
        self._process.join()
        code = self._process.exitcode or 0
        if code == -signal.SIGKILL:
            return "its process was killed, as the system does when memory runs out"
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"its process died ({how})"

    def close(self) -> None:
        """End the process, whatever it is at."""
        self._process.terminate()
        self._process.join()
        self.connection.close()


def one_thread() -> None:
    """Each process computes on one core."""
    torch.set_num_threads(1)


def each_apart(
    function: Callable[..., Any],
    tasks: Mapping[Key, tuple[Any, ...]],
    jobs: int,
    setup: Callable[[], Any] = one_thread,
) -> Iterator[tuple[Key, Any]]:
    """Do `function(*arguments)` for each task in `jobs` processes; yields each with its result or its `Failure`, as they end.

    Raises:
        PwsError: what a task was given is wrong; the others are ended.
    """
    waiting = deque(tasks.items())
    busy: dict[Any, tuple[Worker, Key]] = {}
    idle: list[Worker] = []
    try:
        while waiting or busy:
            while waiting and len(busy) < jobs:
                key, arguments = waiting.popleft()
                worker = idle.pop() if idle else Worker(setup)
                worker.send(function, *arguments)
                busy[worker.connection] = worker, key
            for connection in wait(list(busy)):
                worker, key = busy[connection]
                outcome = worker.receive()
                del busy[connection]
                if worker.alive:
                    idle.append(worker)
                yield key, outcome
    finally:
        for worker in [*idle, *(worker for worker, _ in busy.values())]:
            worker.close()


def _end_with_parent() -> None:
    """A command that is killed closes nothing, and its processes would train for nobody."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _serve(connection: Connection, setup: Callable[[], Any]) -> None:
    """Do what comes, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C goes to all: this process has nothing to say of it
    Thread(target=_end_with_parent, daemon=True).start()
    setup()
    with suppress(EOFError, OSError):
        while True:
            function, arguments = connection.recv()
            connection.send(outcome_of(function, arguments))


def outcome_of(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    """Whether it is an error of what was given, and the result, the `Failure` or the error's message."""
    try:
        return False, function(*arguments)
    except PwsError as error:
        return True, " at ".join([str(error), *(frame.strip() for frame in frames_of_others(error)[-1:])])
    except (Exception, SystemExit) as error:  # in a task, as in the models that it trains, anything may go wrong
        return False, Failure(reason_with_frame(error))
