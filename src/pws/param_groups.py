"""Parameter groups for any torch optimizer: which parameters decay, and at which learning rate."""

from __future__ import annotations

from typing import Any

from torch import nn

from pws.errors import PwsError
from pws.layers import StandardizedLayer


def param_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, scale_lr_factor: float = 1.0
) -> list[dict[str, Any]]:
    """Groups for any optimizer of `torch.optim` that takes groups: `SGD(pws.param_groups(model, lr=0.1), momentum=0.9)`.

    - "weights": everything that is not below, with `lr` and `weight_decay`;
    - "scales": alpha and bias (beta) of the pws layers, with `lr * scale_lr_factor` and no decay;
    - "no_decay": other biases, norm parameters and gains, with `lr` and no decay.

    A norm parameter or gain is known by its shape, one number a channel: at most one dimension larger than 1, leading
    (timm's `(out, 1, 1, 1)` gains too). LayerNorm parameters of more dimensions are known by their module. A shared
    parameter stands in one group, once; frozen parameters (`requires_grad=False`) and empty groups are left out.

    Raises:
        PwsError: nothing in the model is trainable, or a rate or the decay is negative.
    """
    for name, value in {"lr": lr, "weight_decay": weight_decay, "scale_lr_factor": scale_lr_factor}.items():
        if not 0 <= value < float("inf"):
            raise PwsError(f"{name} must be finite and at least 0; got {value!r}.")
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "scales": [], "no_decay": []}
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                groups[_group_of(module, name, parameter)].append(parameter)
    if not seen:
        raise PwsError(f"{type(model).__name__} has no trainable parameter: nothing to optimize. Is all of it frozen?")
    rates = {"weights": (lr, weight_decay), "scales": (lr * scale_lr_factor, 0.0), "no_decay": (lr, 0.0)}
    return [
        {"params": parameters, "lr": rates[name][0], "weight_decay": rates[name][1], "name": name}
        for name, parameters in groups.items()
        if parameters
    ]


def _group_of(module: nn.Module, name: str, parameter: nn.Parameter) -> str:
    if isinstance(module, StandardizedLayer) and name in ("alpha", "bias"):
        return "scales"
    one_a_channel = parameter.numel() == (parameter.shape[0] if parameter.dim() else 1)
    return "no_decay" if one_a_channel or isinstance(module, nn.LayerNorm | nn.RMSNorm) else "weights"
