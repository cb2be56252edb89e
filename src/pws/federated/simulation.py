"""Flower's network on one machine, in one process: each message goes straight to the app of its client."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from typing import Final

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

RUN: Final = 1
SERVER: Final = 0
"""Flower's numbers of a run and of the node that sends; nobody else is there."""


class Simulation(Grid):
    """A Grid for Flower's strategies whose nodes are `clients` clients, asked one after the other.

    So the same run has the same numbers, and needs no ray, by which Flower's own engine starts clients.

    Args:
        app: the client's app; its context has the client's number, from 0, as "partition-id".
        clients: how many there are, "num-partitions".
        config: the context's run_config.
    """

    def __init__(self, app: ClientApp, clients: int, config: UserConfig | None = None) -> None:
        self.app = app
        self.contexts = [
            Context(RUN, node, {"partition-id": node, "num-partitions": clients}, RecordDict(), dict(config or {}))
            for node in range(clients)
        ]
        self._run = Run.create_empty(RUN)
        self._replies: dict[str, Message] = {}
        self._numbers = count()
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN, SERVER, SERVER

    def set_run(self, run: Run) -> None:
        """The run that messages belong to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Flower's message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The numbers of the clients."""
        return range(len(self.contexts))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Let the clients answer; returns what the replies can be pulled by."""
        answered = {
            str(number): self._answer(message) for message, number in zip(messages, self._numbers, strict=False)
        }
        self._replies.update(answered)
        return list(answered)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies."""
        return [self._replies.pop(number) for number in message_ids]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """The replies of the clients; none takes longer than it takes."""
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message:
        """The client's reply, or what Flower replies with where the client's app raises."""
        try:
            return self.app(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:
            reason = f"{type(error)}:<'{error}'>"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
