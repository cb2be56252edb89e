"""What the optimizers of `pws.optim` share: which parameters are kernels, and the latents `w` and `alpha` in their state.

The model's parameter is the kernel, always. `w` and `alpha` are made from it at the first step (`pws._mark.adopt`), and anew
whenever somebody else has written to it since: a loaded checkpoint, a broadcast, an initialization.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pws._errors import PwsError
from pws._mark import Mark, adopt, kernel_of
from pws._param_groups import Group, Member, param_groups
from pws._standardize import constants, swap_channels
from pws.kernels import Layer
from pws.optim.bound import is_bound
from pws.optim.in_backward import REFUSAL, StepInBackward
from pws.optim.layout import centre, filters, filters_shape, same_layout
from pws.optim.moving import Moving
from pws.optim.scaler import notice_scaled_gradients
from pws.optim.sharding import check_sharding, complete_gradient, like, local, versions

Groups = Iterable[dict[str, Any]]
Peaks = tuple[float, float, float]
ROUNDING: Final = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}
"""How far a kernel and its latents may be apart by rounding, in units of the largest entry."""
WANTED: Final = (
    "an optimizer of pws.optim takes the model, or groups from pws.param_groups, which tell what is standardized"
)


class StandardizingOptimizer(Optimizer):
    """Keeps the weights of marked layers standardized; `SGD`, `AdamW` and `Wrapped` say how they move."""

    SHARED: ClassVar[tuple[str, ...]] = ()
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
        self.members: dict[Tensor, Member] = {}
        """What is known of each parameter."""
        self.layers: dict[Tensor, dict[str, Tensor]] = {}
        """Each parameter, to all those of its layer by name."""
        self._groups: dict[Tensor, int] = {}
        self.plans: dict[Any, Moving] = {}
        """By the parameters that have gradients."""
        self._versions: dict[Tensor, tuple[int, int]] = {}
        self._in_backward: StepInBackward | None = None
        self._stepped = False
        super().__init__(groups_of(params, defaults), defaults)
        self._watch()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure` returns, which is called first, if given.

        Raises:
            NonFiniteGradientError: a gradient is not finite; nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_step()
        return loss

    @torch._disable_dynamo  # type: ignore[attr-defined]  # as torch's own `zero_grad` is: the fused steps are no graph of tensors
    def _take_step(self) -> None:
        if not self._stepped:
            self._stepped = True
            self._check_scale()
        if self._in_backward is None:
            self.move(None)
        else:
            self._in_backward.end()

    def _check_scale(self) -> None:
        """Warn if the first step is cut because its gradients are a GradScaler's still."""
        lengths = [
            group["lr"] * float(torch.linalg.vector_norm(local(parameter.grad)))
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and parameter.grad.layout == torch.strided
        ]
        if self.step_bound is not None and max(lengths, default=0.0) > self.step_bound:
            notice_scaled_gradients(self)

    def move(self, parameters: Iterable[Tensor] | None) -> None:
        """Move what has a gradient, all or of `parameters`."""
        raise NotImplementedError

    def rates(self, weight: Tensor, group: dict[str, Any], bias_group: dict[str, Any] | None) -> tuple[Any, Peaks]:
        """What a layer's step multiplies with."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of `pws.param_groups`: a layer that joins later.

        Raises:
            PwsError: it was made otherwise, so that nobody can tell which of its parameters are kernels.
        """
        group = param_group if isinstance(param_group, Group) else None
        if group is None and param_group.get("standardized") is not False:
            raise PwsError(
                f"{WANTED}; got {_what(param_group)}. Pass pws.param_groups(part, lr=...) of each part of the model that has "
                "settings of its own. Parameters that no layer holds join as {'params': [...], 'standardized': False}."
            )
        super().add_param_group(dict(param_group))
        for parameter in self.param_groups[-1]["params"]:
            member = group.members[parameter] if group else Member("a parameter without layer", "")
            self.members[parameter], self._groups[parameter] = member, len(self.param_groups) - 1
            self.layers[parameter] = group.layers[member.layer] if group else {"": parameter}  # type: ignore[assignment]
            if member.mark is not None:
                check_sharding(parameter, member.name, member.transposed)
                centre(parameter, member.transposed)
        self._watch()

    def with_gradients(self, parameters: Iterable[Tensor] | None) -> dict[Tensor, dict[str, Any]]:
        """The parameters that have a gradient, all or of `parameters`, with their groups."""
        if parameters is None:
            held = ((parameter, group) for group in self.param_groups for parameter in group["params"])
        else:
            held = ((parameter, self.param_groups[self._groups[parameter]]) for parameter in parameters)
        found = {}
        for parameter, group in held:
            if parameter.grad is None:
                continue
            if parameter.grad.layout != torch.strided or parameter not in self.members:
                self._refuse(parameter)
            complete_gradient(parameter)
            found[parameter] = group
        return found

    def _refuse(self, parameter: Tensor) -> None:
        if parameter not in self.members:
            raise PwsError(
                f"a parameter of shape {tuple(parameter.shape)} has taken the place of one that the optimizer was made for. "
                "Shard, cast or replace parameters first, then make the optimizer."
            )
        raise PwsError(
            f"the gradient of {self.members[parameter].name!r} is sparse, and pws.optim takes dense ones. Make the embedding "
            "with sparse=False, or give it an optimizer of its own."
        )

    def bias_of(self, weight: Tensor, groups: dict[Tensor, dict[str, Any]]) -> Tensor | None:
        """The bias that moves with a marked weight, in one layer; None if it has none, or one with other settings."""
        bias = self.layers[weight].get("bias")
        if bias is None or bias not in groups or not self._is_one_a_filter(bias, weight):
            return None
        alike = all(groups[bias].get(key) == groups[weight].get(key) for key in self.SHARED)
        return bias if alike else None

    def _is_one_a_filter(self, bias: Tensor, weight: Tensor) -> bool:
        return bias.is_contiguous() and bias.shape == filters_shape(weight, self.members[weight])[:1]

    def layer(self, weight: Tensor, bias: Tensor | None, moments: tuple[str, ...]) -> Layer:
        """A marked layer, ready to be moved; its latents are adopted where they are not the kernel's."""
        member, state = self.members[weight], self.state[weight]
        assert member.mark is not None
        assert weight.grad is not None
        kernel = filters(weight, member)
        self._reconcile(weight, member, kernel)
        w, alpha = self._like(weight, "w", kernel), local(state["alpha"])
        c, gamma = constants(w, member.mark.gain, member.mark.gamma, member.mark.relative_gamma)
        held = None if bias is None else local(bias)
        return Layer(
            name=member.name,
            c=c,
            gamma=gamma,
            kernel=kernel,
            is_copy=kernel.data_ptr() != local(weight).data_ptr(),
            w=w,
            alpha=alpha,
            bias=held,
            moments=[self.moment(weight, name, w, state["w"].shape) for name in moments],
            alpha_moments=[self.moment(weight, f"alpha_{name}", alpha, state["alpha"].shape) for name in moments],
            bias_moments=[]
            if bias is None or held is None
            else [self.moment(bias, n, held, bias.shape) for n in moments],
            grad_dtype=weight.grad.dtype,
        )

    def gradient(self, weight: Tensor, layer: Layer) -> Tensor:
        """The gradient of a kernel, laid out as it."""
        grad = filters(weight.grad, self.members[weight])
        return grad if same_layout(grad, layer.kernel) else torch.empty_like(layer.kernel, dtype=grad.dtype).copy_(grad)

    def is_ours(self, weight: Tensor) -> bool:
        """Whether nobody has written to a kernel since we did."""
        return self._versions.get(weight) == versions(weight)

    def _reconcile(self, weight: Tensor, member: Member, kernel: Tensor) -> None:
        """Adopt the kernel, unless it is what the latents say."""
        state = self.state[weight]
        assert member.mark is not None
        if "w" in state and (self.is_ours(weight) or _is_kernel_of(state, member.mark, kernel)):
            return
        if not torch.isfinite(kernel).all():
            raise PwsError(
                f"the weight {member.name!r} holds NaN or infinity, and has no standardized form. Look for it in the "
                "checkpoint or in the initialization."
            )
        w, alpha = adopt(kernel, member.mark)
        shape = filters_shape(weight, member)
        state["w"], state["alpha"] = like(weight, w, shape), like(weight, alpha, shape[:1])

    def moment(self, parameter: Tensor, name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
        """A running average of the state, zero at first, laid out and stored as `tensor`."""
        if name not in self.state[parameter]:
            self.state[parameter][name] = like(parameter, torch.zeros_like(tensor), shape)
        return self._like(parameter, name, tensor, tensor.dtype)

    def _like(self, parameter: Tensor, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of the state, laid out as `tensor`, and of `dtype` if one is given: the model may have been cast."""
        whole = self.state[parameter][name]
        found = local(whole)
        if not same_layout(found, tensor) or dtype not in (None, found.dtype):
            found = torch.empty_like(tensor, dtype=dtype or found.dtype).copy_(found)
            self.state[parameter][name] = like(parameter, found, whole.shape)
        return found

    def written(self, now: Moving) -> None:
        """Note that the kernels are ours, tell autograd and autocast that they have changed, and let the gradients go."""
        torch.clear_autocast_cache()
        for weight, layer in zip(now.weights, now.layers, strict=True):
            held, transposed = local(weight), self.members[weight].transposed
            if layer.is_copy:
                held.copy_(swap_channels(layer.kernel, transposed) if transposed else layer.kernel)
            else:
                torch.autograd.graph.increment_version(held)
            if layer.bias is not None:
                torch.autograd.graph.increment_version(layer.bias)
            self._versions[weight] = versions(weight)
            layer.grad = layer.bias_grad = None
        torch.autograd.graph.increment_version(
            [local(parameter) for parameter in now.plain]
        )  # torch's fused steps don't

    def _watch(self) -> None:
        if self.step_in_backward and self._in_backward is None:
            self._in_backward = StepInBackward(self.layers, torch.no_grad()(self.move))
        if self._in_backward is not None:
            self._in_backward.watch()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # torch's GradScaler asks for this before each step: the place to refuse it.
        if self.step_in_backward:
            raise PwsError(REFUSAL.format("a GradScaler unscales and checks all of them before the step"))
        return False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`; latents keep their precision where the model's is lower.

        Raises:
            PwsError: the latents are of another shape than the model's layers.
        """
        saved = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        own = list(chain.from_iterable(group["params"] for group in self.param_groups))
        states = {parameter: state_dict["state"].get(key, {}) for key, parameter in zip(saved, own, strict=False)}
        for parameter, state in states.items():
            w, wanted = state.get("w"), filters_shape(parameter, self.members[parameter])
            if isinstance(w, Tensor) and w.shape != wanted:
                raise PwsError(
                    f"the state holds filters of shape {tuple(w.shape)} for {self.members[parameter].name!r}, which has "
                    f"{tuple(wanted)}. It is of another model, or the layers come in another order."
                )
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group.update({key: value for key, value in self.defaults.items() if key not in group})
        self._versions.clear()
        self.plans.clear()
        for parameter, state in states.items():
            if ("w" in state) != (self.members[parameter].mark is not None):
                self.state.pop(parameter, None)  # averages of another parametrization: not marked then, or not now
                continue
            for name, value in state.items():
                loaded = self.state[parameter][name]
                if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != loaded.dtype:
                    self.state[parameter][name] = value.to(
                        parameter.device
                    )  # torch has cast it to the parameter's dtype

    def __getstate__(self) -> dict[str, Any]:
        own = ("step_bound", "step_in_backward", "members", "layers", "_groups")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "members" in state:  # a whole optimizer, unpickled; else a loaded state_dict
            self._versions, self.plans, self._in_backward, self._stepped = {}, {}, None, False
            self._watch()


def _is_kernel_of(state: dict[str, Tensor], mark: Mark, kernel: Tensor) -> bool:
    w, alpha = local(state["w"]), local(state["alpha"])
    if w.shape != kernel.shape:
        return False
    wanted = kernel_of(w, alpha, mark)
    size = kernel.abs().amax() if kernel.numel() else 0.0
    return bool(((wanted - kernel).abs() <= ROUNDING[kernel.dtype] * size).all())


def groups_of(params: nn.Module | Groups, defaults: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameter groups of what an optimizer was given."""
    if isinstance(params, nn.Module):
        return param_groups(params, lr=defaults["lr"], weight_decay=defaults["weight_decay"])
    groups = [params] if isinstance(params, Tensor | dict) else list(params)
    if not groups or not all(isinstance(group, dict) for group in groups):
        got = _what(groups[0]) if groups else "nothing"
        raise PwsError(f"{WANTED}; got {got}. Pass the model in place of model.parameters().")
    return groups  # type: ignore[return-value]


def check_bound(step_bound: float | None) -> None:
    """Raise `PwsError` unless a step can be bounded by this."""
    if step_bound is not None and not is_bound(step_bound):
        raise PwsError(
            f"step_bound is the longest step of a layer, positive and finite, or None for no bound; got {step_bound!r}. "
            "Leave it out for the default."
        )


def check_not_negative(**settings: float) -> None:
    """Raise `PwsError` for a setting that can't be."""
    for name, value in settings.items():
        if not 0 <= value < float("inf"):
            raise PwsError(f"{name} must be finite and at least 0; got {value!r}.")


def _what(given: object) -> str:
    if isinstance(given, Tensor):
        return f"a tensor of shape {tuple(given.shape)}"
    if isinstance(given, dict):
        return f"a dict of {', '.join(map(str, given))}"
    return f"a {type(given).__name__}"
