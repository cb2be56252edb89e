"""The processes of a run, forked from one that has imported everything: the imports take most of a short run's time."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["forked", "pws.cli.train", "pws.training.detect.data", "torchmetrics.detection"])


@contextmanager
def processes(count: int, port: int, log: Path, arguments: list[str]) -> Iterator[list[BaseProcess]]:
    """`pws` with these arguments in so many processes, with what torchrun sets for each; none is left behind."""
    ranks = [FORKS.Process(target=_rank, args=(rank, count, port, log, arguments)) for rank in range(count)]
    for rank in ranks:
        rank.start()
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def run_forked(count: int, port: int, folder: Path, arguments: list[str]) -> None:
    """Run to the end, without an error."""
    log = folder.with_suffix(".log")
    with processes(count, port, log, arguments) as ranks:
        wait(ranks, 200)
        assert [rank.exitcode for rank in ranks] == [0] * count, log.read_text()


def wait(ranks: list[BaseProcess], seconds: float) -> None:
    """Until all have ended; of a hang, until the time is up."""
    end = time.monotonic() + seconds
    for rank in ranks:
        rank.join(max(0.0, end - time.monotonic()))


def free_port() -> int:
    """For processes on this machine to meet at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _rank(rank: int, count: int, port: int, log: Path, arguments: list[str]) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update({"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1"})
    import torch
    from lightning.fabric.utilities import rank_zero

    from pws.cli import main

    torch.set_num_threads(1)
    del rank_zero.rank_zero_only.rank  # set when it was imported, before this was a rank
    importlib.reload(rank_zero)
    sys.exit(main(arguments))
