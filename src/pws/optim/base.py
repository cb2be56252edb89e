"""What the optimizers of `pws.optim` share: which parameters are kernels, and the latents `w` and `alpha` in their state.

The model's parameter is the kernel, always. `w` and `alpha` are made from it at the first step (`pws.mark.adopt`), and anew
whenever somebody else has written to it since: a loaded checkpoint, a broadcast, an initialization.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pws.errors import PwsError
from pws.mark import Mark, adopt
from pws.optim.in_backward import REFUSAL, StepInBackward
from pws.optim.layer import Layer
from pws.optim.sharding import check_sharding, like, local
from pws.param_groups import Group, Member, param_groups
from pws.standardize import constants, standardize, swap_channels

Groups = Iterable[dict[str, Any]]
STEP_BOUND: Final = 0.03
"""The longest gradient step of a layer: about the largest that training held at every batch size (docs/methods.md)."""
ROUNDING: Final = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""How far apart the kernel and its latents may be by rounding, in units of the largest entry: other devices sum in another order."""


class NonFiniteGradientError(PwsError):
    """A gradient holds NaN or infinity; what it belongs to was not moved."""


class StandardizingOptimizer(Optimizer):
    """Keeps the weights of marked layers standardized; `SGD`, `AdamW` and `Wrapped` say how they move."""

    SHARED: Final[tuple[str, ...]] = ()
    """The settings in which the groups of a layer's weight and bias must agree for the bias to move with the layer."""

    def __init__(
        self,
        params: nn.Module | Groups,
        defaults: dict[str, Any],
        step_bound: float | None,
        step_in_backward: bool = False,
    ) -> None:
        check_bound(step_bound)
        self.step_bound, self.step_in_backward = step_bound, step_in_backward
        self._members: dict[Tensor, Member] = {}
        self._layers: dict[Tensor, dict[str, Tensor]] = {}
        self._versions: dict[Tensor, int] = {}
        self._in_backward: StepInBackward | None = None
        super().__init__(groups_of(params, defaults), defaults)
        self._watch()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns what `closure` returns, which is called first, if given.

        Raises:
            NonFiniteGradientError: a gradient is not finite; nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._in_backward is None:
            self._move(None)
        else:
            self._in_backward.end()
        return loss

    def _move(self, parameters: Iterable[Tensor] | None) -> None:
        """Move what has a gradient, all or of `parameters`."""
        raise NotImplementedError

    def _watch(self) -> None:
        self._in_backward = StepInBackward(self._layers, torch.no_grad()(self._move)) if self.step_in_backward else None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # torch's GradScaler asks for this before each step: the place to refuse it.
        if self.step_in_backward:
            raise PwsError(REFUSAL.format("a GradScaler unscales and checks all of them before the step"))
        return False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of `pws.param_groups`: a layer that joins later.

        Raises:
            PwsError: it was made otherwise, so that nobody can tell which of its parameters are kernels.
        """
        if not isinstance(param_group, Group) and param_group.get("standardized") is not False:
            raise PwsError(
                "an optimizer of pws.optim takes the model, or groups from pws.param_groups, which tell which weights are "
                f"standardized; got {_what(param_group)}. Pass the model; or pws.param_groups(part, lr=...) of each part of "
                "it that has settings of its own. Parameters that no layer holds join as {'params': [...], 'standardized': False}."
            )
        super().add_param_group(dict(param_group))
        members = param_group.members if isinstance(param_group, Group) else {}
        for parameter in self.param_groups[-1]["params"]:
            member = members.get(parameter, Member("", ""))
            check_sharding(parameter, member.name, member.transposed if member.mark else 0)
            self._members[parameter] = member
            held = param_group.layers.setdefault(member.layer, {}) if isinstance(param_group, Group) else {}
            held[member.name.rpartition(".")[2]] = parameter
            self._layers[parameter] = held
            if member.mark is not None:
                centre(parameter, member.transposed)
        if self._in_backward is not None:
            self._in_backward.watch()

    def standardized(self) -> dict[Tensor, Member]:
        """The parameters that are kernels, with what is known of them."""
        return {parameter: member for parameter, member in self._members.items() if member.mark is not None}

    def _with_gradients(self, parameters: Iterable[Tensor] | None) -> dict[Tensor, dict[str, Any]]:
        """The parameters to move, all or of `parameters`, with their groups."""
        wanted = None if parameters is None else set(parameters)
        found = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or (wanted is not None and parameter not in wanted):
                    continue
                member = self._members.get(parameter)
                if member is None:
                    raise PwsError(
                        f"a parameter of shape {tuple(parameter.shape)} has taken the place of one that the optimizer was made "
                        "for. Shard, cast or replace parameters first, then make the optimizer."
                    )
                if parameter.grad.is_sparse:
                    raise PwsError(
                        f"the gradient of {member.name!r} is sparse, and pws.optim takes dense ones. Make the embedding "
                        "with sparse=False, or give it an optimizer of its own."
                    )
                found[parameter] = group
        return found

    def _bias_of(self, weight: Tensor, groups: dict[Tensor, dict[str, Any]]) -> Tensor | None:
        """The bias that moves with a marked weight, in one layer; None if it has none, or one with other settings."""
        bias = self._layers[weight].get("bias")
        if bias is None or bias not in groups:
            return None
        alike = all(groups[bias].get(key) == groups[weight].get(key) for key in self.SHARED)
        return bias if alike else None

    def _layer(
        self,
        weight: Tensor,
        bias: Tensor | None,
        rates: Any,
        peaks: tuple[float, float, float],
        moments: tuple[str, ...],
    ) -> Layer:
        """A marked layer, ready to be moved; its latents are adopted where they are not the kernel's."""
        member = self._members[weight]
        kernel, grad = filters(weight, member), filters(weight.grad, member)
        self._reconcile(weight, member, kernel)
        state = self.state[weight]
        w = local(state["w"])
        if not same_layout(w, kernel):
            w = torch.empty_like(kernel, dtype=w.dtype).copy_(w)
            state["w"] = like(weight, w, state["w"].shape)
        if not same_layout(grad, kernel):
            grad = torch.empty_like(kernel, dtype=grad.dtype).copy_(grad)
        c, gamma = constants(w, *_settings(member.mark))
        own = [self._moment(weight, name, w, state["w"].shape) for name in moments]
        alpha = local(state["alpha"])
        of_alpha = [self._moment(weight, f"alpha_{name}", alpha, state["alpha"].shape) for name in moments]
        layer = Layer(member.name, c, gamma, grad, kernel, w, alpha, own, of_alpha, rates, peaks)
        if bias is not None:
            layer.bias, layer.bias_grad = local(bias), local(bias.grad)  # type: ignore[arg-type]
            layer.bias_moments = [self._moment(bias, name, layer.bias, bias.shape) for name in moments]
        return layer

    def _reconcile(self, weight: Tensor, member: Member, kernel: Tensor) -> None:
        """Adopt the kernel, unless it is what the latents say."""
        state = self.state[weight]
        if "w" in state and self._versions.get(weight) == local(weight)._version:
            return
        assert member.mark is not None
        if "w" in state and self._is_kernel_of(state, member.mark, kernel):
            return
        if not torch.isfinite(kernel).all():
            raise PwsError(
                f"the weight {member.name!r} holds NaN or infinity, and has no standardized form. Look for it in the checkpoint "
                "or in the initialization."
            )
        w, alpha = adopt(kernel, member.mark)
        shape = filters_shape(weight, member)
        state["w"], state["alpha"] = like(weight, w, shape), like(weight, alpha, shape[:1])

    @staticmethod
    def _is_kernel_of(state: dict[str, Tensor], mark: Mark, kernel: Tensor) -> bool:
        w, alpha = local(state["w"]), local(state["alpha"])
        if w.shape != kernel.shape:
            return False
        wanted = standardize(w, alpha, gain=mark.gain, gamma=mark.gamma, relative_gamma=mark.relative_gamma)
        off = (wanted - kernel.to(wanted.dtype)).abs()
        size = kernel.abs().amax().to(off.dtype) if kernel.numel() else off.sum()
        return bool((off <= ROUNDING[kernel.dtype] * size).all())

    def _moment(self, parameter: Tensor, name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
        """A running average of the state, zero at first, laid out as `tensor`."""
        state = self.state[parameter]
        if name not in state:
            state[name] = like(parameter, torch.zeros_like(tensor), shape)
        found = local(state[name])
        if not same_layout(found, tensor):
            found = torch.empty_like(tensor).copy_(found)
            state[name] = like(parameter, found, shape)
        return found

    def _written(self, weights: Iterable[Tensor], layers: Iterable[Layer]) -> None:
        """Note that the kernels are ours; autograd is told that they have changed."""
        for weight, layer in zip(weights, layers, strict=True):
            held, transposed = local(weight), self._members[weight].transposed
            if layer.kernel.data_ptr() == held.data_ptr():
                torch.autograd.graph.increment_version(held)
            else:
                held.copy_(swap_channels(layer.kernel, transposed) if transposed else layer.kernel)
            self._versions[weight] = held._version

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`; latents keep their precision where the model's is lower.

        Raises:
            PwsError: the latents are of another shape than the model's layers.
        """
        saved = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        own = list(chain.from_iterable(group["params"] for group in self.param_groups))
        states = {parameter: state_dict["state"].get(key, {}) for key, parameter in zip(saved, own, strict=False)}
        for parameter, state in states.items():
            w = state.get("w")
            if isinstance(w, Tensor) and w.numel() != parameter.numel():
                raise PwsError(
                    f"the state holds a weight of shape {tuple(w.shape)} for {self._members[parameter].name!r}, which has "
                    f"{tuple(parameter.shape)}. It is of another model, or the layers come in another order."
                )
        super().load_state_dict(state_dict)
        self._versions.clear()
        for parameter, state in states.items():
            for name, value in state.items():
                if (
                    isinstance(value, Tensor)
                    and value.is_floating_point()
                    and value.dtype != self.state[parameter][name].dtype
                ):
                    self.state[parameter][name] = value.to(
                        parameter.device
                    )  # torch has cast it to the parameter's dtype

    def __getstate__(self) -> dict[str, Any]:
        own = ("step_bound", "step_in_backward", "_members", "_layers")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_members" in state:  # a whole optimizer, unpickled; else a loaded state_dict
            self._versions = {}
            self._watch()


def groups_of(params: nn.Module | Groups, defaults: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameter groups of what an optimizer was given."""
    if isinstance(params, nn.Module):
        return param_groups(params, lr=defaults["lr"], weight_decay=defaults["weight_decay"])
    groups = list(params)
    if not groups or not all(isinstance(group, dict) for group in groups):
        raise PwsError(
            "an optimizer of pws.optim takes the model, or groups from pws.param_groups(model, lr=...), which tell which weights "
            f"are standardized; got {_what(groups[0]) if groups else 'nothing'}. Pass the model in place of model.parameters()."
        )
    return groups


def check_bound(step_bound: float | None) -> None:
    """Raise `PwsError` unless a step can be bounded by this."""
    if step_bound is not None and not 0 < step_bound < float("inf"):
        raise PwsError(
            f"step_bound is the longest step of a layer, positive and finite, or None for no bound; got {step_bound!r}. "
            f"Usual: {STEP_BOUND}."
        )


def check_not_negative(**settings: float) -> None:
    """Raise `PwsError` for a setting that can't be."""
    for name, value in settings.items():
        if not 0 <= value < float("inf"):
            raise PwsError(f"{name} must be finite and at least 0; got {value!r}.")


def filters(tensor: Tensor | None, member: Member) -> Tensor:
    """What this process holds of a weight or its gradient, with one filter an entry of the leading dimension, dense in memory."""
    assert tensor is not None
    held = local(tensor).detach()
    held = swap_channels(held, member.transposed) if member.transposed else held
    return held if is_dense(held) else held.contiguous()


def filters_shape(weight: Tensor, member: Member) -> torch.Size:
    """Of the whole weight, filters first."""
    if not member.transposed:
        return weight.shape
    a, b, *size = weight.shape
    return torch.Size([b * member.transposed, a // member.transposed, *size])


def is_dense(tensor: Tensor) -> bool:
    """Whether the entries of each filter lie next to each other in memory, one filter behind the other, in whatever order."""
    expected = 1
    for dim in sorted(range(1, tensor.dim()), key=tensor.stride):
        if tensor.shape[dim] > 1:
            if tensor.stride(dim) != expected:
                return False
            expected *= tensor.shape[dim]
    return tensor.shape[0] <= 1 or tensor.stride(0) == expected


def same_layout(one: Tensor, other: Tensor) -> bool:
    """Whether the entries of two tensors of one shape come in the same order; strides of single entries mean nothing."""
    strides = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(size == 1 or mine == its for size, mine, its in strides)


@torch.no_grad()
def centre(weight: Tensor, transposed: int) -> None:
    """Take the mean of each filter out of a weight, where it is more than rounding."""
    held = local(weight)
    rows = swap_channels(held, transposed) if transposed else held
    dims = tuple(range(1, rows.dim()))
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    mean = wide.mean(dims, keepdim=True)
    rounding = 16 * torch.finfo(rows.dtype).eps * wide.square().mean(dims, keepdim=True).sqrt()
    if bool((mean.abs() > rounding).any()):
        centred = (wide - torch.where(mean.abs() > rounding, mean, 0.0)).to(rows.dtype)
        held.copy_(swap_channels(centred, transposed) if transposed else centred)


def _settings(mark: Mark | None) -> tuple[float, float, bool]:
    assert mark is not None
    return mark.gain, mark.gamma, mark.relative_gamma


def _what(given: object) -> str:
    if isinstance(given, Tensor):
        return f"a tensor of shape {tuple(given.shape)}"
    if isinstance(given, dict):
        return f"a dict of {', '.join(map(str, given))}"
    return f"a {type(given).__name__}"
