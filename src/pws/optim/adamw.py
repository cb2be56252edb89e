"""AdamW on the latents of standardized kernels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from pws._errors import PwsError
from pws.kernels import AdamWRates
from pws.optim.base import Groups, Peaks, StandardizingOptimizer, check_not_negative
from pws.optim.bound import ahead_of, factors_of
from pws.optim.moving import Moving, can_be_fused, gradient_of
from pws.optim.planning import moving
from pws.optim.sharding import local

TAKEN_BOUND: Final = 0.05
"""The longest step of a layer, as it is taken. (SGD's bound is on the gradient's step: momentum makes it longer.)"""
MOMENTS: Final = ("exp_avg", "exp_avg_sq")


class AdamW(StandardizingOptimizer):
    """`torch.optim.AdamW` that keeps the weights of marked layers standardized, and bounds the step of every layer.

    The gradients of `w` and `alpha` are those of `pws.optim.SGD`. With AdamW's step `D = -lr (m / (sqrt(v) + eps) + decay x)`,
    bias-corrected, of each tensor `x` of a layer (`w`, alpha without decay, bias):

        f = min(1, step_bound / (|D| peak / lr)),     x <- x + f D,     weight <- c alpha (w - mean(w)) / sqrt(var(w) + gamma)

    where `peak` is the largest rate of the schedule. So no layer's step is longer than the bound, whatever the rate, and steps
    shrink as the schedule falls. Unmarked layers are moved and bounded likewise.

    The state of a marked weight holds `w` (filters first), `alpha` `(out_channels,)`, their averages and `step`.

    Args:
        params: the model; or groups from `pws.param_groups`.
        lr: learning rate.
        betas: decay rates of the averages of the gradient and of its square.
        eps: added to the root.
        weight_decay: decay of the weights; alpha, biases and norm parameters have none.
        step_bound: the longest step of a layer, as it is taken; None for none.
        step_in_backward: as in `pws.optim.SGD`.

    Raises:
        PwsError: a setting can't be, or `params` do not tell which weights are standardized.
    """

    SHARED = ("betas", "eps")

    def __init__(
        self,
        params: nn.Module | Groups,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        step_bound: float | None = TAKEN_BOUND,
        step_in_backward: bool = False,
    ) -> None:
        check_not_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        if not all(0 <= beta < 1 for beta in betas):
            raise PwsError(f"betas must be at least 0 and below 1; got {betas}. Usual: (0.9, 0.999).")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "scale_lr_factor": 1.0}
        super().__init__(params, defaults, step_bound, step_in_backward)

    def move(self, parameters: Iterable[Tensor] | None) -> None:
        """See `StandardizingOptimizer`."""
        now = moving(self, MOMENTS, parameters)
        if now is None:
            return
        now.check_finite(now.squares(lambda step: step.squares()), lambda p: self.members[p].name)
        for parameter in (*now.plain, *now.weights, *(bias for bias in now.biases if bias is not None)):
            self.state[parameter]["step"] = self._step_of(parameter) + 1
        if now.plain:
            self._move_plain(now)
        squares = now.squares(lambda step: step.adamw_squares())
        ahead = squares.new_tensor([ahead_of(now.groups[weight]) for weight in now.weights])
        factors = factors_of(squares * ahead.square(), self.step_bound)
        now.apply(lambda step, own: step.adamw(own), factors)
        self.written(now)

    def bias_of(self, weight: Tensor, groups: dict[Tensor, dict[str, Any]]) -> Tensor | None:
        """As its base, for a bias that has taken as many steps as the weight: one of them may have been frozen."""
        bias = super().bias_of(weight, groups)
        return bias if bias is not None and self._step_of(bias) == self._step_of(weight) else None

    def _step_of(self, parameter: Tensor) -> Tensor:
        found = self.state[parameter].get("step")
        return torch.zeros((), dtype=torch.float32, device="cpu") if found is None else found.cpu()

    def rates(
        self, weight: Tensor, group: dict[str, Any], bias_group: dict[str, Any] | None
    ) -> tuple[AdamWRates, Peaks]:
        """See `StandardizingOptimizer`."""
        of_bias = bias_group or {"lr": 0.0, "weight_decay": 0.0}
        (beta1, beta2), t = group["betas"], float(self._step_of(weight)) + 1
        lrs = (float(group["lr"]), float(group["lr"]) * group["scale_lr_factor"], float(of_bias["lr"]))
        decays = (group["weight_decay"], of_bias["weight_decay"])
        return AdamWRates(*lrs, *decays, beta1, beta2, group["eps"], 1 - beta1**t, 1 - beta2**t), lrs

    def _move_plain(self, now: Moving) -> None:
        """By torch's own function, a call per group; then each layer's step is cut to the bound."""
        before = [local(p).clone() for p in now.plain]
        for group in self.param_groups:
            own = [p for p in now.plain if now.groups[p] is group]
            if not own:
                continue
            params = [local(p) for p in own]
            averages = [[self.moment(p, name, local(p), p.shape) for p in own] for name in MOMENTS]
            fused = can_be_fused(params)
            steps = [self.state[p]["step"].to(p.device if fused else "cpu") - 1 for p in own]  # it counts for itself
            adamw(
                params,
                [gradient_of(p) for p in own],
                exp_avgs=averages[0],
                exp_avg_sqs=averages[1],
                max_exp_avg_sqs=[],
                state_steps=steps,
                fused=fused,
                foreach=False,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
        now.cut_plain(before, self.step_bound)
