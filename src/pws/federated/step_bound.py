"""The bound on a client's steps: as far per round as central training goes, whatever the momentum that restarts with it."""

from __future__ import annotations

from typing import Final

from pws._errors import PwsError
from pws.optim.bound import STEP_BOUND

USUAL_MOMENTUM: Final = 0.9
"""What STEP_BOUND was found with: its gradient steps add up to tenfold ones."""


def client_bound(momentum: float, steps: int) -> float:
    """Compute the `step_bound` of `pws.optim.SGD` for a client that makes so many steps per round with fresh momentum.

    The bound is on a step before momentum. Steps at the bound, all in one direction, take a layer this far:

        sum over j = 1 .. steps of bound (1 - momentum^j) / (1 - momentum)

    Central training with momentum 0.9 goes 0.03 / (1 - 0.9) = 0.3 per step. The client's bound is that for which it goes 0.3
    per step on average. Without momentum it is 0.3; with much momentum and few steps it lies between 0.3 and 0.03.

    Raises:
        PwsError: momentum is not in [0, 1), or steps is below 1.

    Examples:
        >>> round(client_bound(momentum=0.0, steps=10), 3)
        0.3
        >>> round(client_bound(momentum=0.9, steps=10), 3)
        0.072
        >>> round(client_bound(momentum=0.9, steps=10_000), 3)
        0.03
    """
    if not (0 <= momentum < 1 and steps >= 1):
        raise PwsError(
            f"a client's bound needs a momentum of at least 0 and below 1, and 1 step per round or more; got momentum "
            f"{momentum!r} and {steps!r} steps. Usual: momentum 0 or 0.9."
        )
    reach = STEP_BOUND / (1 - USUAL_MOMENTUM)
    restart = momentum * (1 - momentum**steps) / (1 - momentum)  # steps' worth that the fresh momentum lacks
    return reach * steps * (1 - momentum) / (steps - restart)
