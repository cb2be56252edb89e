"""What clients reply with, and what may be wrong with it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final

import torch
from flwr.app import Message, MetricRecord

from pws._errors import cut, reason_of
from pws.federated.client import ARRAYS, METRICS
from pws.federated.federation import State
from pws.training.checkpoints import misfits

TRAINED: Final = frozenset({"num-examples", "loss"})
MEASURED: Final = frozenset({"num-examples", "loss", "accuracy"})
"""What clients tell of their training, and of their measurements."""


def fault_of(reply: Message, metrics: frozenset[str], wanted: State | None = None) -> str | None:
    """Why a client's reply is left out, in words; None if nothing is wrong with it.

    Args:
        reply: the message.
        metrics: the names that it must have numbers for.
        wanted: what its arrays must look like; None for a reply without arrays.
    """
    if reply.has_error():
        return f"dropped out ({_plain(reply.error.reason or '')})"
    records = {METRICS} if wanted is None else {METRICS, ARRAYS}
    found: Mapping[str, Any] = reply.content.metric_records.get(METRICS, MetricRecord())
    if (
        set(reply.content) != records
        or set(found) != metrics
        or not all(isinstance(v, int | float) for v in found.values())
    ):
        return f"sent other records than {', '.join(sorted(records))} with {', '.join(sorted(metrics))}"
    images = found["num-examples"]
    if not 0 <= images < math.inf or (wanted is not None and not images):
        return f"sent {images} as its number of images"
    if wanted is not None and math.isnan(found["loss"]):
        return "sent NaN as its loss"
    return None if wanted is None else _fault_of_arrays(reply, wanted)


def _fault_of_arrays(reply: Message, wanted: State) -> str | None:
    try:
        state: State = dict(reply.content.array_records[ARRAYS].to_torch_state_dict())
    except Exception as error:  # a client may send anything
        return f"sent arrays that can't be read ({reason_of(error)})"
    problems = sorted(misfits(state, wanted))
    if problems:
        return f"sent weights of another architecture ({len(problems)} differences, such as: {problems[0]})"
    bad = [name for name, value in state.items() if not torch.isfinite(value).all()]
    return f"sent NaN or infinity in {len(bad)} of {len(state)} arrays (first: {bad[0]})" if bad else None


def _plain(reason: str) -> str:
    """Flower's words for an exception without its marks."""
    return cut(re.sub(r"<class '(?:\w+\.)*(\w+)'>:<'(.*)'>", r"\1: \2", " ".join(reason.split())), 300)
