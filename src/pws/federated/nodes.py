"""Flower's nodes by the numbers of their clients."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from pws._errors import PwsError
from pws.federated.client import CONFIG

CONNECTING: Final = 300.0
"""Seconds that all nodes have to connect and to tell their clients' numbers."""
ANSWERING: Final = 3600.0
"""Seconds that a client has to answer in a round: Flower's own."""


@dataclass(frozen=True)
class Nodes:
    """The grid, and which of its nodes is which client."""

    grid: Grid
    node_of: dict[int, int]
    """Client number to node number."""

    def train(
        self, strategy: FedAvg, number: int, arrays: ArrayRecord, chosen: Iterable[int]
    ) -> dict[int, Message | None]:
        """What the chosen clients reply to round `number`'s weights, in the order of their numbers; None for no reply."""
        messages = strategy.configure_train(number, arrays, ConfigRecord(), self._shown(chosen))
        return self._sent(messages, chosen)

    def evaluate(
        self, strategy: FedAvg, number: int, arrays: ArrayRecord, part: str, chosen: Iterable[int]
    ) -> dict[int, Message | None]:
        """What clients reply about the weights on their part of the validation or test images."""
        messages = strategy.configure_evaluate(number, arrays, ConfigRecord({"part": part}), self._shown(chosen))
        return self._sent(messages, chosen)

    def _shown(self, chosen: Iterable[int]) -> Grid:
        """Flower's strategies ask a grid for its nodes and for nothing else, and draw some of them: we draw before."""
        shown = [self.node_of[client] for client in chosen]
        return cast(Grid, SimpleNamespace(get_node_ids=lambda: shown))

    def _sent(self, messages: Iterable[Message], chosen: Iterable[int]) -> dict[int, Message | None]:
        replies = {
            reply.metadata.src_node_id: reply for reply in self.grid.send_and_receive(messages, timeout=ANSWERING)
        }
        return {client: replies.get(self.node_of[client]) for client in sorted(chosen)}


def connected(grid: Grid, clients: int) -> Nodes:
    """The nodes, once all clients are there.

    Raises:
        PwsError: they are not in time.
    """
    ends = time.monotonic() + CONNECTING
    while len(nodes := list(grid.get_node_ids())) < clients:
        if time.monotonic() > ends:
            raise PwsError(
                f"{len(nodes)} of {clients} clients have connected to the server within {CONNECTING:.0f} s. The logs of their "
                "processes tell why."
            )
        time.sleep(0.2)
    messages = [Message(RecordDict(), node, MessageType.QUERY) for node in nodes]
    replies = list(grid.send_and_receive(messages, timeout=CONNECTING))
    node_of = {_client_of(reply): reply.metadata.src_node_id for reply in replies}
    missing = sorted(set(range(clients)) - set(node_of))
    if missing:
        raise PwsError(f"the clients {missing[:5]} have not told the server that they are there. Start all of them.")
    return Nodes(grid, node_of)


def _client_of(reply: Message) -> Any:
    return None if reply.has_error() else reply.content.config_records[CONFIG]["client"]
