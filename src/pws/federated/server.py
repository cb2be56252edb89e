"""The server: rounds of training and averaging, each of them stored."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from pws._errors import PwsError
from pws._files import write_whole
from pws.federated.client import METRICS
from pws.federated.federation import Federation, State, federation_in, seed_of
from pws.federated.local import measure
from pws.federated.nodes import Nodes, connected
from pws.federated.replies import MEASURED, TRAINED, fault_of
from pws.federated.results import PICTURE, FederatedSummary, draw_rounds
from pws.federated.stored import store, stored_in, weights_in
from pws.federated.strategies import moments_of, restore_moments, strategy_of
from pws.training.checkpoints import BEST, LAST, load_checkpoint
from pws.training.metrics_file import MetricsFile, Row
from pws.training.progress import duration
from pws.training.run_folder import CHECKPOINTS, SUMMARY
from pws.training.summary import versions

Say = Callable[[str], None]


def serve(grid: Grid, folder: Path, say: Say) -> None:
    """Do all rounds that are left of the run in `folder`, on the clients of a grid, and write its summary.

    Raises:
        PwsError: a client is missing.
        NobodyLeftError: no client of a round has sent weights that can be averaged.
    """
    with quiet_flower():
        federation = federation_in(folder)
        Server(federation, folder, connected(grid, len(federation.shares)), say).run()


@contextmanager
def quiet_flower() -> Iterator[None]:
    """Let Flower speak of errors alone."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class NobodyLeftError(PwsError):
    """All clients of round `number` are left out; `overflowed` tells whether each of them for numbers that overflowed."""

    def __init__(self, number: int, faults: dict[int, str]) -> None:
        client, fault = next(iter(faults.items()))
        self.number = number
        self.overflowed = all("NaN" in fault or "NonFinite" in fault for fault in faults.values())
        advice = "Lower --optim.lr" if self.overflowed else f"--resume goes on behind round {number - 1}"
        super().__init__(
            f"round {number} ended without anything to average: all {len(faults)} clients are left out; client {client} "
            f"{fault}. {advice}."
        )


def _as(value: Tensor, dtype: torch.dtype) -> Tensor:
    """An average in the type of what it is an average of; one of counts is rounded."""
    return (value.round() if value.is_floating_point() and not dtype.is_floating_point else value).to(dtype)


class Server:
    """A federated run in its folder; goes on behind the last round that is stored there."""

    def __init__(self, federation: Federation, folder: Path, nodes: Nodes, say: Say) -> None:
        self.federation, self.folder, self.nodes, self.say = federation, folder, nodes, say
        self.config, self.validates = federation.recipe.federated, federation.data.splits.validation is not None
        trained = {name for name, _ in federation.module.model.named_parameters()}
        self.wanted = {
            name: value.cpu() for name, value in federation.initial.items() if name not in federation.personal
        }
        self.strategy = strategy_of(self.config, self.wanted.keys() - trained)
        stored = stored_in(folder, federation)
        restore_moments(self.strategy, stored.moments)
        self.averaged: State = {name: stored.state[name].cpu() for name in self.wanted}
        self.progress = stored.progress
        self.rows: list[Row] = list(stored.rows)
        self.file = MetricsFile(folder, stored.rows)

    def run(self) -> None:
        """All rounds that are left, and the test; writes summary.json.

        Raises:
            NobodyLeftError: no client of a round has sent weights that can be averaged.
        """
        began, before = time.perf_counter(), self.progress
        first, seconds = before.number, before.seconds
        for number in range(first + 1, self.config.rounds + 1):
            row = self._round(number)
            self.progress.number = number
            self.progress.seconds = seconds + time.perf_counter() - began
            self._note(row | {"seconds": round(self.progress.seconds, 2)})
            self._store(LAST)
            left = (time.perf_counter() - began) / (number - first) * (self.config.rounds - number)
            self.say(self._line(number, row, left))
        self._end()

    def _round(self, number: int) -> dict[str, float]:
        """One round; the row of metrics.csv."""
        replies = self.nodes.train(self.strategy, number, ArrayRecord(self.averaged), self._chosen(number))
        good = self._without_faults(number, replies, TRAINED, self.wanted)
        arrays, metrics = self.strategy.aggregate_train(number, good)
        assert arrays is not None
        assert metrics is not None
        found = arrays.to_torch_state_dict()
        self.averaged = {name: _as(found[name], value.dtype) for name, value in self.wanted.items()}
        row = {"train_loss": float(metrics["loss"]), "clients": len(good)}  # type: ignore[arg-type]
        if self.validates:
            validated = self._measured(number, "validation")
            row |= {f"val_{name}": value for name, value in validated.items()}
            self._compare(number, validated["accuracy"])
        return row

    def _chosen(self, number: int) -> list[int]:
        """The clients that take part in a round."""
        rng = np.random.default_rng(seed_of(self.federation.recipe.seed, "round", number))
        clients = len(self.federation.shares)
        return sorted(rng.choice(clients, self.config.per_round, replace=False).tolist())

    def _without_faults(
        self, number: int, replies: dict[int, Message | None], metrics: frozenset[str], wanted: State | None = None
    ) -> list[Message]:
        """The replies with nothing wrong; the others are named and left out.

        Raises:
            NobodyLeftError: there is none.
        """
        good, faults = list[Message](), dict[int, str]()
        for client, reply in replies.items():
            fault = "did not answer" if reply is None else fault_of(reply, metrics, wanted)
            if fault is not None:
                faults[client] = fault
            elif reply is not None:
                good.append(reply)
        for client, fault in faults.items():
            self.say(f"round {number}: client {client} is left out: it {fault}")
            self.progress.left_out[str(client)] = self.progress.left_out.get(str(client), 0) + 1
        if not good:
            raise NobodyLeftError(number, faults)
        return good

    def _measured(self, number: int, part: str) -> dict[str, float]:
        """Accuracy and loss of the average on the validation or test images; by the clients if their norms stay there."""
        if not self.federation.personal:
            self.federation.load(self.averaged)
            found = measure(self.federation.module, self.federation.tested(part))
            return {name: found[name] for name in ("accuracy", "loss")}
        clients = range(len(self.federation.shares))
        replies = self.nodes.evaluate(self.strategy, number, ArrayRecord(self.averaged), part, clients)
        good = self._without_faults(number, replies, MEASURED)
        counted = [reply for reply in good if reply.content.metric_records[METRICS]["num-examples"]]
        if not counted:
            raise NobodyLeftError(number, dict.fromkeys(clients, f"has none of the {part} images"))
        metrics = self.strategy.aggregate_evaluate(number, counted)
        return {name: float(metrics[name]) for name in ("accuracy", "loss")}  # type: ignore[index, arg-type]

    def _compare(self, number: int, accuracy: float) -> None:
        """Store the best round so far; norms that stay with clients are as they are now in this round alone."""
        if self.progress.best is not None and accuracy <= self.progress.best:
            return
        self.progress.best, self.progress.best_round = accuracy, number
        if self.federation.personal:
            self.progress.metrics = self._measured(number, "test")
        self._store(BEST, number)

    def _note(self, row: dict[str, float]) -> None:
        self.rows.append(row | {"step": self.progress.number})
        self.file.log_metrics(row, self.progress.number)
        self.file.save()

    def _store(self, name: str, number: int | None = None) -> None:
        """Write a checkpoint of the average after round `number`, or after the last one."""
        self.federation.load(self.averaged)
        path, number = self.folder / CHECKPOINTS / name, self.progress.number if number is None else number
        store(self.federation, path, number, self.progress, moments_of(self.strategy))

    def _line(self, number: int, row: dict[str, float], left: float) -> str:
        validated = (
            f"validation loss {row['val_loss']:.4f}  accuracy {100 * row['val_accuracy']:.2f} %  "
            if "val_loss" in row
            else ""
        )
        return (
            f"round {number}/{self.config.rounds}  loss {row['train_loss']:.4f}  {validated}{row['clients']:.0f} of "
            f"{self.config.per_round} clients  {duration(self.progress.seconds)}"
            + (f", {duration(left)} left" if number < self.config.rounds else "")
        )

    def _tested(self) -> dict[str, float]:
        """Accuracy and loss of the best round, or the last, on the test images, if they are finite."""
        found = self.progress.metrics
        if not found:
            if self.validates:
                state = weights_in(load_checkpoint(self.folder / CHECKPOINTS / BEST))
                self.averaged = {name: state[name] for name in self.wanted}
            found = self._measured(self.progress.number, "test")
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def _end(self) -> None:
        """Test, draw, and write what there is to say."""
        progress, metrics = self.progress, self._tested()
        draw_rounds(self.rows, "accuracy", self.folder / PICTURE)
        sizes = [len(share) for share in self.federation.shares]
        summary = FederatedSummary(
            status="finished",
            score="accuracy",
            best=progress.best,
            best_round=progress.best_round if self.validates else progress.number,
            checkpoint="best" if self.validates else "last",
            metrics=metrics,
            rounds=progress.number,
            clients=len(sizes),
            images_per_client=[min(sizes), max(sizes)],
            left_out=progress.left_out,
            seconds=round(progress.seconds, 3),
            parameters=sum(p.numel() for p in self.federation.module.model.parameters()),
            device=f"{self.federation.device.type}, {torch.get_num_threads()} threads",
            versions=versions() | {"flwr": version("flwr")},
        )
        write_whole(self.folder / SUMMARY, json.dumps(asdict(summary), indent=2, allow_nan=False) + "\n")
