"""The bound on each layer's step in private training, for optimizers that have none of their own."""

from __future__ import annotations

from typing import Any

from torch import nn

from pws._clip_grad import clip_grad
from pws._errors import PwsError
from pws.optim.bound import Bound


def bound_steps(model: nn.Module, optimizer: Any, bound: Bound = "auto") -> None:
    """Bound each layer's step after the noise was added, from now on in every step of Opacus' optimizer.

    It is `pws.clip_grad` in the right place: what is clipped before the noise is lost, and a bound after it costs no privacy,
    because it depends on the private gradient alone. An optimizer of `pws.optim` bounds its steps itself.

    Opacus' optimizer has room for one hook, which `PrivacyEngine.make_private` fills with its accountant. Attach none of your
    own: the privacy spent would no longer be counted. This one calls the accountant first.

    Args:
        model: the network, wrapped by Opacus or not.
        optimizer: Opacus', as `make_private` gives it, around SGD.
        bound: the longest step of a layer, in the unit of the weights; "auto" is `0.3 (1 - momentum)`.

    Raises:
        PwsError: the optimizer is not Opacus'. In its steps: what `pws.clip_grad` raises.
    """
    if not hasattr(optimizer, "attach_step_hook"):
        raise PwsError(
            f"the steps of Opacus' optimizer are bounded here; got {type(optimizer).__name__}. Give what "
            "PrivacyEngine.make_private returned, or call pws.clip_grad before each step without Opacus."
        )
    accountant = optimizer.step_hook

    def bounded(noisy: Any) -> None:
        if accountant is not None:
            accountant(noisy)
        clip_grad(model, noisy, bound)

    optimizer.attach_step_hook(bounded)
