"""Steps in the backward pass: layers move as soon as a sixteenth of all gradients is there, and free them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import Tensor, distributed
from torch.autograd import Variable

from pws._errors import PwsError

REFUSAL: Final = (
    "step_in_backward=True moves each layer in the backward pass, before all gradients are there, but {}. Make the optimizer "
    "without it."
)
AT_ONCE: Final = 1 / 16
"""Share of all gradients that may wait. A call of the step takes half a millisecond, whatever it moves: layers share one."""


class StepInBackward:
    """Watches the parameters of an optimizer.

    Args:
        layers: the optimizer's parameters, each with all those of its layer by name.
        move: moves some parameters.

    Raises:
        PwsError: several processes train together: they average gradients only after they are accumulated.
    """

    def __init__(self, layers: Mapping[Tensor, Mapping[str, Tensor]], move: Callable[[list[Tensor]], None]) -> None:
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise PwsError(REFUSAL.format("several processes average theirs after that"))
        self._layers, self._move = layers, move
        self._arrived: dict[int, set[Tensor]] = {}
        self._complete: set[int] = set()
        """Layers whose gradients are there, moved or waiting."""
        self._waiting: list[Tensor] = []
        self._handles: list[Any] = []
        self.watch()

    def watch(self) -> None:
        """Watch the parameters that the optimizer holds now."""
        for handle in self._handles:
            handle.remove()
        self._at_once = AT_ONCE * sum(parameter.nbytes for parameter in self._layers)
        self._handles = [p.register_post_accumulate_grad_hook(self._arrive) for p in self._layers]

    def end(self) -> None:
        """The iteration ends: layers of which a part got no gradient may have waited for it."""
        self._waiting += [parameter for arrived in self._arrived.values() for parameter in arrived]
        self._arrived.clear()
        self._complete.clear()
        self._take_waiting()

    def _arrive(self, parameter: Tensor) -> None:
        layer = self._layers[parameter]
        if id(layer) in self._complete:
            raise PwsError(
                REFUSAL.format("a second backward pass came before step(): gradients that are accumulated must wait")
            )
        arrived = self._arrived.setdefault(id(layer), set())
        arrived.add(parameter)
        if all(p in arrived for p in layer.values() if p.requires_grad and p in self._layers):
            self._complete.add(id(layer))
            if not self._waiting:
                Variable._execution_engine.queue_callback(self._take_waiting)
            self._waiting += self._arrived.pop(id(layer))
            if sum(p.grad.nbytes for p in self._waiting if p.grad is not None) >= self._at_once:
                self._take_waiting()

    def _take_waiting(self) -> None:
        parameters, self._waiting = self._waiting, []
        if not parameters:
            return
        try:
            self._move(parameters)
        except PwsError:
            # The backward pass ends here, and whoever catches this starts another.
            self._forget()
            raise
        for parameter in parameters:
            parameter.grad = None

    def _forget(self) -> None:
        self._arrived.clear()
        self._complete.clear()
        self._waiting.clear()
