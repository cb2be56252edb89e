"""The Flower app of a client: it trains and measures the weights that it receives."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from pws.federated.federation import Federation, State, federation_in
from pws.federated.local import measure, train_client
from pws.federated.personal import keep, kept

ARRAYS: Final = "arrays"
CONFIG: Final = "config"
METRICS: Final = "metrics"
"""The names of records in messages; Flower's strategies use them."""
app = ClientApp()  # without a type: Flower looks for a plain assignment


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the received weights; reply with what became of them, but for what stays with the client."""
    federation, client, config = _received(message, context, rounds_ago=1)
    number = config["server-round"]
    loss = train_client(federation, client, number, config.get("proximal-mu", 0.0))
    state: State = dict(federation.module.model.state_dict())
    if federation.personal:
        keep(_folder(context), client, number, {name: state.pop(name) for name in federation.personal})
    metrics = MetricRecord({"num-examples": len(federation.shares[client]), "loss": loss})
    return Message(RecordDict({ARRAYS: ArrayRecord(state), METRICS: metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure the received weights on the client's part of the validation or test images."""
    federation, client, config = _received(message, context, rounds_ago=0)
    found = measure(federation.module, federation.tested(config["part"], client))
    return Message(RecordDict({METRICS: MetricRecord(dict(found))}), reply_to=message)


@app.query()
def introduce(message: Message, context: Context) -> Message:
    """Reply with the client's number: nodes are given other ones in each session."""
    return Message(RecordDict({CONFIG: ConfigRecord({"client": _number(context)})}), reply_to=message)


def _received(message: Message, context: Context, *, rounds_ago: int) -> tuple[Federation, int, dict[str, Any]]:
    """The federation with the weights loaded, the client's number and what the server configures.

    What stays with the client is as it was so many rounds ago.
    """
    federation, client = federation_in(_folder(context)), _number(context)
    config: dict[str, Any] = dict(message.content.config_records[CONFIG])
    received = message.content.array_records[ARRAYS].to_torch_state_dict()
    before = config["server-round"] - rounds_ago
    own = kept(_folder(context), client, before) if federation.personal else {}
    federation.load(own, received)
    return federation, client, config


def _folder(context: Context) -> Path:
    return Path(str(context.run_config["folder"]))


def _number(context: Context) -> int:
    return int(context.node_config["partition-id"])
