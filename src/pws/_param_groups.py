"""Parameter groups: which parameters decay, at which learning rate, and which layer each belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from pws._errors import PwsError
from pws._layers import StandardizedLayer
from pws._mark import TRANSPOSED, Mark, mark_of


@dataclass(frozen=True)
class Member:
    """What an optimizer of `pws.optim` knows of a parameter."""

    name: str
    """As in `model.named_parameters()`."""
    layer: str
    """The module that it belongs to; the first that holds it."""
    mark: Mark | None = None
    """How it is standardized; None for a plain parameter."""
    transposed: int = 0
    """The groups of a transposed convolution whose weight it is; 0 for any other parameter."""


class Group(dict[str, Any]):
    """A parameter group that knows the layers of its parameters: any torch optimizer takes it, those of `pws.optim` need it."""

    def __init__(
        self,
        settings: dict[str, Any],
        members: dict[nn.Parameter, Member],
        layers: dict[str, dict[str, nn.Parameter]],
    ) -> None:
        super().__init__(settings)
        self.members = members
        self.layers = layers
        """The parameters of each layer by name, those of the model's other groups too."""


def param_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, scale_lr_factor: float = 1.0
) -> list[dict[str, Any]]:
    """Make the parameter groups for an optimizer of `pws.optim` or `torch.optim`.

        pws.optim.SGD(pws.param_groups(model, lr=0.1), momentum=0.9)

    - "weights": everything that is not below, with `lr` and `weight_decay`;
    - "scales": alpha and bias (beta) of standardized layers, with `lr * scale_lr_factor` and no decay;
    - "no_decay": other biases, norm parameters and gains, with `lr` and no decay.

    A norm parameter or gain is known by its shape, one number per channel: at most one dimension larger than 1, leading
    (timm's `(out, 1, 1, 1)` gains too). LayerNorm parameters of more dimensions are known by their module. A shared
    parameter stands in one group, once; frozen parameters (`requires_grad=False`) and empty groups are left out.

    The optimizers of `pws.optim` take groups of several calls together, such as one for the backbone and one for the head at
    another rate. The alpha of a marked layer is theirs, not the model's: its rate is the weight's times `scale_lr_factor`.

    Raises:
        PwsError: nothing in the model is trainable, a rate or the decay is negative, or layers that share a weight standardize
            it in different ways.
    """
    for name, value in {"lr": lr, "weight_decay": weight_decay, "scale_lr_factor": scale_lr_factor}.items():
        if not 0 <= value < float("inf"):
            raise PwsError(f"{name} must be finite and at least 0; got {value!r}.")
    groups: dict[str, dict[nn.Parameter, Member]] = {"weights": {}, "scales": {}, "no_decay": {}}
    seen: dict[nn.Parameter, Member] = {}
    layers: dict[str, dict[str, nn.Parameter]] = {}
    for layer, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            member = _member(layer, module, name)
            if parameter in seen:
                _check_shared(seen[parameter], member)
            elif parameter.requires_grad:
                seen[parameter] = member
                layers.setdefault(layer, {})[name] = parameter
                groups[_group_of(module, name, parameter)][parameter] = member
    if not seen:
        raise PwsError(f"{type(model).__name__} has no trainable parameter: nothing to optimize. Is all of it frozen?")
    rates = {"weights": (lr, weight_decay), "scales": (lr * scale_lr_factor, 0.0), "no_decay": (lr, 0.0)}
    found: list[dict[str, Any]] = []
    for name, members in groups.items():
        settings = {"params": list(members), "lr": rates[name][0], "weight_decay": rates[name][1], "name": name}
        if any(member.mark for member in members.values()):
            settings["scale_lr_factor"] = scale_lr_factor
        if members:
            found.append(Group(settings, members, layers))
    return found


def _member(layer: str, module: nn.Module, name: str) -> Member:
    mark = mark_of(module) if name == "weight" else None
    transposed = int(module.groups) if mark and isinstance(module, TRANSPOSED) else 0
    return Member(f"{layer}.{name}" if layer else name, layer, mark, transposed)


def _check_shared(first: Member, again: Member) -> None:
    if (first.mark, first.transposed) != (again.mark, again.transposed):
        raise PwsError(
            f"layers that share a weight must standardize it alike; {first.name!r} has {first.mark} and {again.name!r} "
            f"{again.mark}. Mark both with the same settings, or neither."
        )


def _group_of(module: nn.Module, name: str, parameter: nn.Parameter) -> str:
    if (isinstance(module, StandardizedLayer) or mark_of(module)) and name in ("alpha", "bias"):
        return "scales"
    one_a_channel = parameter.numel() == (parameter.shape[0] if parameter.dim() else 1)
    return "no_decay" if one_a_channel or isinstance(module, nn.LayerNorm | nn.RMSNorm) else "weights"
