"""SGD on the latents of standardized kernels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim.sgd import sgd

from pws._errors import PwsError
from pws.kernels import SGDRates
from pws.optim.base import Groups, Peaks, StandardizingOptimizer, check_not_negative
from pws.optim.bound import Bound, bound_with, factors_of, peak_lr
from pws.optim.moving import Moving, can_be_fused, gradient_of
from pws.optim.planning import moving
from pws.optim.sharding import local


class SGD(StandardizingOptimizer):
    """`torch.optim.SGD` that keeps the weights of marked layers standardized, and bounds the step of every layer.

    With the gradient `G` of a marked layer's weight, its kernel `c alpha h`, `h = (w - m) r`, `r = 1 / sqrt(v + gamma)`:

        d alpha_o = c sum(G_o h_o),      d w_o = c alpha_o r_o (G_o - mean(G_o) - h_o mean(G_o h_o))
        f = min(1, step_bound / sqrt((lr |d w|)^2 + (lr |d alpha|)^2 + (lr |d bias|)^2)),      lr the largest of its schedule
        w, alpha, bias <- SGD with f times these gradients; weight decay acts on w
        weight <- c alpha (w - m) r

    This is the same as SGD on the layer form (`pws.Conv2d`) behind `pws.clip_grad`. Unmarked layers are moved as
    `torch.optim.SGD` moves them, their gradients bounded in the same way.

    The state of a marked weight holds `w` (filters first: `(out_channels, ...)`), `alpha` `(out_channels,)` and their momentum,
    in float32 (float64 for float64 models): for half-precision models they are the master weights.

    Args:
        params: the model; or groups from `pws.param_groups`, several models' or parts' together.
        lr: learning rate.
        momentum: momentum factor.
        weight_decay: decay of the weights; alpha, biases and norm parameters have none.
        nesterov: Nesterov momentum.
        step_bound: the longest gradient step of a layer, before momentum; None for none. "auto" is `0.3 (1 - momentum)`, which
            moves a layer at the bound equally far with every momentum.
        step_in_backward: step the layers in the backward pass, as soon as a sixteenth of all gradients is there, and free it.
            `step()` then only ends the iteration. For one backward pass per step: no accumulation, GradScaler, clipping or DDP.

    Raises:
        PwsError: a setting can't be, or `params` do not tell which weights are standardized.

    Examples:
        >>> import pws, torch
        >>> model = nn.Sequential(pws.mark(nn.Linear(4, 3), gain="linear"))
        >>> optimizer = SGD(model, lr=0.1, momentum=0.9)
        >>> model(torch.ones(2, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> bool(model[0].weight.mean(1).abs().max() < 1e-6)
        True
    """

    SHARED = ("momentum", "nesterov")

    def __init__(
        self,
        params: nn.Module | Groups,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        step_bound: Bound | None = "auto",
        step_in_backward: bool = False,
    ) -> None:
        check_not_negative(lr=lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and not momentum:
            raise PwsError("nesterov needs a momentum above 0; got momentum 0.")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        bound = bound_with(momentum) if step_bound == "auto" else step_bound
        super().__init__(params, {**defaults, "scale_lr_factor": 1.0}, bound, step_in_backward)

    def move(self, parameters: Iterable[Tensor] | None) -> None:
        """See `StandardizingOptimizer`."""
        moments = ("momentum_buffer",) if any(group["momentum"] for group in self.param_groups) else ()
        now = moving(self, moments, parameters)
        if now is None:
            return
        if not now.moves_at_once(lambda step: step.bounded_sgd(self.step_bound)):
            squares = now.squares(lambda step: step.squares())
            now.check_finite(squares, lambda p: self.members[p].name)
            if now.plain:
                self._move_plain(now)
            now.apply(lambda step, own: step.sgd(own), factors_of(squares, self.step_bound))
        self.written(now)

    def _move_plain(self, now: Moving) -> None:
        """By torch's own function, a call per group."""
        grads = [gradient_of(p) for p in now.plain]
        if self.step_bound is not None:
            factors = now.plain_factors(grads, [peak_lr(now.groups[p]) for p in now.plain], self.step_bound)
            grads = [grad * factor.to(grad.device, grad.dtype) for grad, factor in zip(grads, factors, strict=True)]
        for group in self.param_groups:
            own = [i for i, p in enumerate(now.plain) if now.groups[p] is group]
            if not own:
                continue
            params = [local(now.plain[i]) for i in own]
            buffers: list[Tensor | None] = [None] * len(own)
            if group["momentum"]:
                buffers = [
                    self.moment(now.plain[i], "momentum_buffer", local(now.plain[i]), now.plain[i].shape) for i in own
                ]
            fused = can_be_fused(params)
            sgd(
                *(params, [grads[i] for i in own], buffers),
                fused=fused,
                foreach=False,
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=0.0,
                nesterov=group["nesterov"],
                maximize=False,
            )

    def rates(self, weight: Tensor, group: dict[str, Any], bias_group: dict[str, Any] | None) -> tuple[SGDRates, Peaks]:
        """See `StandardizingOptimizer`."""
        factor, of_bias = group["scale_lr_factor"], bias_group or {"lr": 0.0, "weight_decay": 0.0}
        lrs = (float(group["lr"]), float(group["lr"]) * factor, float(of_bias["lr"]))
        rates = SGDRates(*lrs, group["weight_decay"], of_bias["weight_decay"], group["momentum"], group["nesterov"])
        peak = peak_lr(group)
        return rates, (peak, peak * factor, peak_lr(of_bias))
