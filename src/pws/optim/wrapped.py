"""Any optimizer of torch on the latents of standardized kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pws._errors import PwsError, one_line
from pws.kernels.reference import ReferenceStep, rows, write_kernel
from pws.optim.adamw import TAKEN_BOUND
from pws.optim.base import Groups, Peaks, StandardizingOptimizer
from pws.optim.bound import ahead_of, by_layer, factors_of
from pws.optim.moving import norms_of
from pws.optim.planning import moving
from pws.optim.sharding import is_sharded

OURS: Final = ("params", "name", "scale_lr_factor")
"""Keys of a group that are not settings of the inner optimizer."""
SET_BY_US: Final = ("params", "lr", "weight_decay")
"""Keys of an inner group that differ from ours."""
MakeOptimizer = Callable[..., Optimizer]


@dataclass
class _Follower:
    """A group of an inner optimizer that takes its settings from one of ours."""

    inner: dict[str, Any]
    outer: int
    is_alpha: bool
    own: dict[str, Any] | None
    """The rates of ours and of the inner group at the start, where the inner group has settings of its own."""


class Wrapped(StandardizingOptimizer):
    """Any `torch.optim.Optimizer`, timm's too, that moves `w`, alpha and biases, with a bound on the step that it takes.

        Wrapped(model, torch.optim.RMSprop, lr=0.01)
        Wrapped(model, torch.optim.Muon, lr=0.02, scales=partial(torch.optim.AdamW, lr=1e-3))

    The inner optimizer sees each marked weight as the matrix `w` `(out_channels, fan_in)`, with the gradient of
    `pws.optim.SGD`; alpha without decay; and every plain parameter as it is. Its step of a layer is cut as that of
    `pws.optim.AdamW` is. Then the kernel is made from `w` and alpha.

    The state of a marked weight holds `w` (filters first), `alpha`, what the inner optimizer keeps of `w`, and of alpha under
    `alpha_...`. Groups are ours: a scheduler changes them, and the inner optimizer follows.

    Args:
        params: the model; or groups from `pws.param_groups`.
        optimizer: a class, or any function of parameter groups.
        lr: learning rate; the inner optimizer's default if left out.
        weight_decay: decay of the weights.
        step_bound: the longest step of a layer, as it is taken; None for none.
        scales: makes a second optimizer for alpha, biases and all else that is not a matrix. An optimizer that takes only
            matrices needs it. Its learning rate keeps its ratio to ours.
        settings: settings of the inner optimizer.

    Raises:
        PwsError: the inner optimizer refuses its settings, or `params` do not tell which weights are standardized.
    """

    def __init__(
        self,
        params: nn.Module | Groups,
        optimizer: MakeOptimizer,
        lr: float | None = None,
        weight_decay: float = 0.0,
        *,
        step_bound: float | None = TAKEN_BOUND,
        scales: MakeOptimizer | None = None,
        **settings: Any,
    ) -> None:
        given = settings if lr is None else {"lr": lr, **settings}
        probe = _make(optimizer, [{"params": [nn.Parameter(torch.zeros(2, 2))]}], given)
        defaults = {**probe.defaults, "weight_decay": weight_decay, "scale_lr_factor": 1.0}
        self._latents: dict[Tensor, tuple[nn.Parameter, nn.Parameter]] = {}
        self._followers: list[_Follower] = []
        super().__init__(params, defaults, step_bound)
        self._make, self._make_scales, self._given = optimizer, scales, given
        self._inner = self._make_inner()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `StandardizingOptimizer`; only before the first step."""
        if getattr(self, "_inner", None):
            raise PwsError(
                "a wrapped optimizer takes all its groups when it is made. Make it anew, or use pws.optim.SGD or AdamW."
            )
        super().add_param_group(param_group)

    def _make_inner(self) -> list[Optimizer]:
        main: list[tuple[dict[str, Any], int, bool]] = []
        rest: list[tuple[dict[str, Any], int, bool]] = []
        for number, group in enumerate(self.param_groups):
            matrices: list[Tensor] = []
            others: list[Tensor] = []
            alphas: list[Tensor] = []
            for parameter in group["params"]:
                if is_sharded(parameter):
                    raise PwsError(
                        "a wrapped optimizer would see parts of sharded matrices. Use pws.optim.SGD or AdamW under fully_shard."
                    )
                if self.members[parameter].mark is None:
                    (matrices if parameter.dim() > 1 else others).append(parameter)
                else:
                    w, alpha = self._latents[parameter] = self._placeholders(parameter)
                    matrices.append(w)
                    alphas.append(alpha)
            main.append(({"params": matrices}, number, False))
            rest.append(({"params": others}, number, False))
            rest.append(({"params": alphas}, number, True))
        if self._make_scales is None:
            return [self._follow(self._make, [*main, *rest], self._given, owns_settings=False)]
        return [
            self._follow(self._make, main, self._given, owns_settings=False),
            self._follow(self._make_scales, rest, {}, owns_settings=True),
        ]

    def _placeholders(self, weight: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
        """Latents of the right shape, which get their data before each step."""
        member = self.members[weight]
        entries = weight.shape[1] * member.transposed if member.transposed else weight.shape[0]
        wide = torch.promote_types(weight.dtype, torch.float32)
        w = torch.zeros(entries, weight.numel() // entries, dtype=wide, device=weight.device)
        return nn.Parameter(w), nn.Parameter(w[:, 0].clone())

    def _follow(
        self,
        make: MakeOptimizer,
        parts: list[tuple[dict[str, Any], int, bool]],
        given: dict[str, Any],
        *,
        owns_settings: bool,
    ) -> Optimizer:
        parts = [part for part in parts if part[0]["params"]]
        inner = _make(make, [group for group, _, _ in parts], given)
        for group, (_, outer, is_alpha) in zip(inner.param_groups, parts, strict=True):
            own = {"outer": self.param_groups[outer]["lr"], "inner": group["lr"]} if owns_settings else None
            self._followers.append(_Follower(group, outer, is_alpha, own))
        return inner

    def move(self, parameters: Iterable[Tensor] | None) -> None:
        """See `StandardizingOptimizer`."""
        now = moving(self, (), parameters)
        if now is None:
            return
        reference = ReferenceStep(now.layers)
        now.check_finite(reference.squares() if now.layers else torch.zeros(0), lambda p: self.members[p].name)
        for weight, layer, (dw, dalpha) in zip(now.weights, now.layers, reference.gradients(), strict=True):
            w, alpha = self._latents[weight]
            w.data, alpha.data, w.grad, alpha.grad = rows(layer.w), layer.alpha, dw, dalpha
        plain = [p for p in now.groups if p not in self._latents]
        moved = [*(part for weight in now.weights for part in self._latents[weight]), *plain]
        owners = [*(weight for weight in now.weights for _ in range(2)), *plain]
        before = [tensor.detach().clone() for tensor in moved]
        self._set_rates()
        for inner in self._inner:
            inner.step()
        for part in chain.from_iterable(self._latents[weight] for weight in now.weights):
            part.grad = None  # a layer without gradient in the next step must not move
        self._note_counts()
        ahead = [ahead_of(now.groups[owner]) for owner in owners]
        self._cut(moved, before, [id(self.layers[owner]) for owner in owners], ahead)
        for layer in now.layers:
            write_kernel(layer)
        self.written(now)
        for parameter in now.groups:
            self._show_state(parameter)

    def bias_of(self, weight: Tensor, groups: dict[Tensor, dict[str, Any]]) -> None:
        """None: a bias is one of the inner optimizer's own parameters."""

    def rates(self, weight: Tensor, group: dict[str, Any], bias_group: dict[str, Any] | None) -> tuple[None, Peaks]:
        """None: rates are the inner optimizer's."""
        return None, (1.0, 1.0, 1.0)

    def _set_rates(self) -> None:
        for follower in self._followers:
            group = self.param_groups[follower.outer]
            factor = group["scale_lr_factor"] if follower.is_alpha else 1.0
            if follower.own is not None:
                start = follower.own
                lr = start["inner"] * (group["lr"] / start["outer"] if start["outer"] else 1.0)
            else:
                follower.inner.update({key: value for key, value in group.items() if key not in OURS})
                lr = group["lr"]
            follower.inner["lr"] = lr * factor
            follower.inner["weight_decay"] = 0.0 if follower.is_alpha else group["weight_decay"]

    def _note_counts(self) -> None:
        """What an inner optimizer has changed in its groups is ours too, and saved: timm's count their steps there."""
        for follower in self._followers:
            if follower.own is None:
                group = self.param_groups[follower.outer]
                group.update({key: value for key, value in follower.inner.items() if key not in SET_BY_US})

    def _cut(self, moved: list[Any], before: list[Tensor], layers: list[int], ahead: list[float]) -> None:
        if self.step_bound is None:
            return
        changes = [new.detach() - old for new, old in zip(moved, before, strict=True)]
        norms = norms_of(changes)
        squares = (norms * norms.new_tensor(ahead)).square()
        factors = factors_of(by_layer(squares, layers), self.step_bound)
        for new, old, change, factor in zip(moved, before, changes, factors, strict=True):
            new.copy_(torch.where(factor < 1, old + change * factor.to(new.device, new.dtype), new))

    def _show_state(self, parameter: Tensor) -> None:
        """The inner optimizers' state in ours: what is saved."""
        latents = self._latents.get(parameter)
        if latents is None:
            self.state[parameter] = self._inner_state(parameter)
            return
        state = self.state[parameter]
        state.update(self._inner_state(latents[0]))
        state.update({f"alpha_{key}": value for key, value in self._inner_state(latents[1]).items()})

    def _inner_state(self, parameter: Tensor) -> dict[str, Any]:
        return next((inner.state[parameter] for inner in self._inner if parameter in inner.state), {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `StandardizingOptimizer`."""
        super().load_state_dict(state_dict)
        for inner in self._inner:
            inner.state.clear()
        for follower in self._followers:
            if follower.own is None:
                for key in set(follower.inner) - set(self.param_groups[follower.outer]):
                    del follower.inner[key]
        for parameter, state in self.state.items():
            if parameter not in self._latents:
                self._holder(parameter).state[parameter] = state
                continue
            w, alpha = self._latents[parameter]
            of_alpha = {key.removeprefix("alpha_"): value for key, value in state.items() if key.startswith("alpha_")}
            of_w = {k: v for k, v in state.items() if k not in ("w", "alpha") and not k.startswith("alpha_")}
            for latent, own in ((w, of_w), (alpha, of_alpha)):
                if own:
                    self._holder(latent).state[latent] = own

    def _holder(self, parameter: Tensor) -> Optimizer:
        return next(i for i in self._inner if any(parameter is p for group in i.param_groups for p in group["params"]))

    def __getstate__(self) -> dict[str, Any]:
        own = ("_latents", "_followers", "_inner", "_make", "_make_scales", "_given")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}


def _make(make: MakeOptimizer, groups: list[dict[str, Any]], settings: dict[str, Any]) -> Optimizer:
    try:
        return make(groups, **settings)
    except (ValueError, TypeError, AssertionError) as error:
        name = getattr(make, "__name__", type(make).__name__)
        raise PwsError(
            f"the optimizer {name} refuses its parameters or settings {settings}: {one_line(error)}. An optimizer of "
            "matrices only, such as Muon, needs scales=, a second one for alpha and biases."
        ) from error
