"""What the processes of a run tell each other beside the training: that all can begin, and which one prints an error."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, cached_property
from typing import Final

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch.distributed import DistNetworkError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from pws._errors import PwsError, StoppedRunError, ToldElsewhereError, one_line, reason_of
from pws.training.module import NonFiniteLossError

BEGIN: Final = timedelta(minutes=30)
"""How long a process waits for the others before the first step, as torch's groups do: one of them may copy its data."""
FAIL: Final = timedelta(seconds=20)
"""How long a process that can't go on waits for the others before it prints why."""
START: Final = "start"


class LostProcessError(StoppedRunError):
    """Another process of the run ended while this one trained; what that one met is not known here."""


class Launched:
    """The processes that a launcher started, this one among them; a store holds what each of them says."""

    def __init__(self, place: ClusterEnvironment) -> None:
        self.place, self.rank, self.size = place, place.global_rank(), place.world_size()
        self.failed = False

    @cached_property
    def store(self) -> Store:
        """In torchrun, or else in the first process, where the process group of the training finds it too."""
        served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = TCPStore(
            self.place.main_address,
            self.place.main_port,
            is_master=self.rank == 0 and not served,
            timeout=BEGIN,
            wait_for_workers=False,
            multi_tenant=True,
        )
        # torchrun starts the processes again where one died, and its store stays.
        return PrefixStore(f"pws/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def exchange(self, stage: str, word: str, patience: timedelta) -> list[str | None]:
        """Say a word, and hear that of each process; None of one that says nothing for so long."""
        keys = [f"{stage}/{rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], word)
        try:
            self.store.wait(keys, patience)
        except RuntimeError:  # which torch's errors of a store are
            return [self.store.get(key).decode() if self.store.check([key]) else None for key in keys]
        return [self.store.get(key).decode() for key in keys]

    def fail(self, reason: str) -> bool:
        """Say why this process can't go on; whether one of a lower number says the same."""
        self.failed = True
        stage = "training" if self.store.check([f"{START}/{self.rank}"]) else START
        said = self.exchange(stage, reason, FAIL)
        if None not in said:
            self.leave()
        return reason in said[: self.rank]

    def leave(self) -> None:
        """Have all processes end together, for one that ends takes its store along, and torchrun ends the others."""
        self.failed = True
        atexit.register(self.exchange, "left", "", FAIL)


@cache
def launched() -> Launched | None:
    """The processes of torchrun or srun; None if this one was started alone, or by Lightning, which starts the others."""
    kinds = (SLURMEnvironment, TorchElasticEnvironment)
    place = next((kind() for kind in kinds if kind.detect()), None)
    return None if place is None or place.world_size() == 1 else Launched(place)


def agree() -> None:
    """Wait until all processes can begin to train.

    Raises:
        PwsError: one of them can't, and says why, or can't be reached.
    """
    group = launched()
    if group is None:
        return
    try:
        words = group.exchange(START, "", BEGIN)
    except DistNetworkError as error:
        raise PwsError(
            f"process {group.rank} of the run can't reach the first one at {group.place.main_address}, port "
            f"{group.place.main_port}: {one_line(error)}. Look at what that one said, and at the network between them."
        ) from error
    for rank, word in enumerate(words):
        if word is None:
            raise PwsError(
                f"process {rank} of the run has not come within {BEGIN}. Look at what it said, or at its machine."
            )
        if word:
            group.leave()
            raise ToldElsewhereError(f"process {rank} of the run can't begin: {word}")


@contextmanager
def one_voice() -> Iterator[None]:
    """Let the first process that meets an error raise it, and all others that meet the same `ToldElsewhereError`."""
    try:
        yield
    except (ToldElsewhereError, LostProcessError, NonFiniteLossError):
        raise
    except (Exception, SystemExit) as error:
        if _told_elsewhere(reason_of(error)):
            raise ToldElsewhereError(f"another process of the run met the same: {error}") from error
        raise


def _told_elsewhere(reason: str) -> bool:
    group = launched()
    if group is None or group.failed:
        return False
    try:
        return group.fail(reason)
    except DistNetworkError:  # nobody is there to tell it
        return False
