"""Flower's strategies: how the server averages, and what of it a resumed run must know."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, FedProx
from torch import Tensor

from pws.training.federated import FederatedConfig

ALL: Final[Any] = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
"""A strategy asks all nodes that it is shown; who takes part in a round is drawn before."""
MOMENTS: Final = ("m_t", "v_t")
"""FedAdam's own names of its running averages."""
Moments = dict[str, dict[str, Tensor]]
"""By these names, and by those of the arrays."""


def strategy_of(config: FederatedConfig, buffers: Iterable[str]) -> FedAvg:
    """The strategy of a recipe; `buffers` are averaged by each."""
    if config.strategy == "fedprox":
        return FedProx(**ALL, proximal_mu=config.proximal_mu)
    if config.strategy == "fedadam":
        return BufferedFedAdam(buffers, config.server_lr)
    return FedAvg(**ALL)


class BufferedFedAdam(FedAdam):
    """FedAdam whose buffers are averages: a step along their change could make a running variance negative."""

    def __init__(self, buffers: Iterable[str], server_lr: float) -> None:
        super().__init__(**ALL, eta=server_lr)
        self.buffers = frozenset(buffers)
        self.plain = FedAvg(**ALL)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Flower's for parameters, the average for buffers."""
        replies = list(replies)
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is not None and self.buffers:
            averaged, _ = self.plain.aggregate_train(server_round, replies)
            arrays.update({name: array for name, array in (averaged or {}).items() if name in self.buffers})
        return arrays, metrics


def moments_of(strategy: FedAvg) -> Moments:
    """The running averages of a strategy, for the checkpoint."""
    held = {name: getattr(strategy, name, None) or {} for name in MOMENTS}
    return {name: {key: torch.tensor(value) for key, value in found.items()} for name, found in held.items()}


def restore_moments(strategy: FedAvg, moments: Moments) -> None:
    """Go on with those of a checkpoint."""
    for name, found in moments.items():
        if found:
            setattr(strategy, name, {key: value.numpy() for key, value in found.items()})
