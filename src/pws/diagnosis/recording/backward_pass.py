"""Hooks that tell one backward pass from the next, and when the training's own has ended."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class BackwardPass:
    """The backward pass that the hooks of a recorder are told of.

    Args:
        on_begin: called when another pass begins than the one before.
    """

    def __init__(self, on_begin: Callable[[], None]) -> None:
        self.on_begin = on_begin
        self.on_end: Callable[[], None] | None = None
        """Called once, when the training's backward pass through the recorded graph has ended, before whatever follows it. It
        brings gradients to parameters; others are part of the model or its loss: forces, gradient penalties."""
        self.in_forward = False
        """Whether the forward pass is still running: a backward pass within it is part of the model."""
        self.trains = False
        """Whether it has brought a parameter its gradient."""
        self._number: int | None = None
        """The engine's number of this pass."""

    def hook(self, hook: Callable[[Tensor], None], *, trains: bool = False) -> Callable[[Tensor], None]:
        """Return a hook for a tensor's gradient; `trains` if the tensor is a parameter."""

        def run(gradient: Tensor) -> None:
            self._begin()
            # With a graph of its own it is a gradient that a loss is made of.
            self.trains |= trains and not torch.is_grad_enabled()
            with torch.no_grad():
                hook(gradient)

        return run

    def accumulated(self, _: Tensor) -> None:
        """Take note that a parameter's gradient was accumulated: a hook for parameters."""
        self._begin()
        self.trains = True

    def _begin(self) -> None:
        number = torch._C._current_graph_task_id()
        if number != self._number:
            self._number = number
            self.on_begin()
            if self.on_end is not None:
                torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        """The engine calls this when everything else of a backward pass is done."""
        if self.trains and not self.in_forward and self.on_end is not None:
            end, self.on_end = self.on_end, None
            end()
