"""The outputs of the last layers with a weight: what a loss hangs on that a model computes itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pws.diagnosis.operation import Call, Operations


def outputs_of_last_layers(run: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The loss that `run` computes, and the outputs of the layers behind which it meets no other."""
    outputs: list[Tensor] = []

    def keep(call: Call) -> Tensor:
        outputs.append(call.run())
        return outputs[-1].clone()  # which an activation may overwrite

    with Operations(keep):
        loss = run()
    found = first_met(loss.grad_fn, {output.grad_fn for output in outputs if output.grad_fn is not None})
    return loss, [output for output in outputs if output.grad_fn in found and output.numel()]


def first_met(start: Any, wanted: set[Any]) -> set[Any]:
    """Those of the `wanted` nodes of a graph that are met first on the ways back from `start`."""
    found, seen, ahead = set(), set(), [start]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in wanted:
            found.add(node)
        else:
            ahead.extend(following for following, _ in node.next_functions)
    return found
