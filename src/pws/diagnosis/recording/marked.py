"""What a step does to the kernel of a marked layer, whose optimizer moves `w` and `alpha` and not the kernel itself.

Shape letters: O filters, K entries of a filter (the fan-in n).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pws._errors import PwsError
from pws._mark import Mark, adopt, filters_of, mark_of
from pws._standardize import constants
from pws.optim.base import ROUNDING
from pws.optim.sharding import is_sharded


def marked_weights(model: nn.Module) -> dict[nn.Parameter, nn.Module]:
    """Each weight that is a standardized kernel, to the layer whose mark says so."""
    found = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and mark_of(module) is not None:
            found[weight] = module
    return found


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Raise `PwsError` if marked weights are split over processes, the optimizer is none, or it is one of torch's own that
    moves a marked weight as a plain one."""
    for weight, layer in marked_weights(model).items():
        if is_sharded(weight):
            raise PwsError(
                f"a diagnosis needs whole filters, and the weight of a marked {type(layer).__name__} is split over processes "
                "(fully_shard). Diagnose a whole copy: load the checkpoint in one process."
            )
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise PwsError(f"optimizer= takes the torch.optim.Optimizer of the model; got a {type(optimizer).__name__}.")
    # Others may wrap one of pws.optim.
    if not type(optimizer).__module__.startswith("torch.optim."):
        return
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    names = {module: name for name, module in model.named_modules()}
    for weight, layer in marked_weights(model).items():
        if weight in trained:
            raise PwsError(
                f"the layer {names[layer]!r} is marked, and torch.optim.{type(optimizer).__name__} moves its weight as a plain "
                "one. Train marked layers with pws.optim.SGD, AdamW or Wrapped; or take the marks off: pws.unmark(model)."
            )


def kernel_step(layer: nn.Module, gradient: Tensor, optimizer: torch.optim.Optimizer | None = None) -> Tensor:
    """The kernel's first-order change by a step of `w` and `alpha` along their gradients, `J J^T G`.

        dw = P(G),    dalpha_o = c sum(G_o h_o),    dk_o = P(dw)_o + c h_o dalpha_o
        P(a)_o = c alpha_o r_o (a_o - mean(a_o) - h_o mean(a_o h_o)),    r = 1 / sqrt(v + gamma),    h = (w - m) r

    The layer form's autograd gives the same; this one needs no graph, so that a hook can call it.

    Args:
        layer: it has a mark.
        gradient: `G`, of the loss by the layer's weight, in the weight's shape.
        optimizer: its state has `w` and `alpha`. Where it has none, or the weight was written to since, they are adopted from
            the weight: that is what the optimizer itself does in its next step.

    Returns:
        float64, in the weight's shape.
    """
    weight, mark = layer._parameters["weight"], mark_of(layer)
    assert weight is not None
    assert mark is not None
    kernel = filters_of(layer, weight.detach())
    state = {} if optimizer is None else optimizer.state.get(weight, {})
    point = _Point.of(state["w"], state["alpha"], mark) if "w" in state else None
    if point is None or not point.is_at(kernel):
        point = _Point.of(*adopt(kernel, mark), mark)
    step_OK = point.step(filters_of(layer, gradient).double().flatten(1))
    return filters_of(layer, step_OK.view(kernel.shape))


@dataclass(frozen=True)
class _Point:
    """Where the latents are, in float64: the formula's terms, `(O, K)` or `(O, 1)`."""

    scale: Tensor
    """`c alpha`."""
    r: Tensor
    h: Tensor
    c: float

    @classmethod
    def of(cls, w: Tensor, alpha: Tensor, mark: Mark) -> _Point:
        c, gamma = constants(w, mark.gain, mark.gamma, mark.relative_gamma)
        w_OK = w.double().flatten(1)
        r = (w_OK.var(1, correction=0, keepdim=True) + gamma).rsqrt()
        return cls(c * alpha.double()[:, None], r, (w_OK - w_OK.mean(1, keepdim=True)) * r, c)

    def is_at(self, kernel: Tensor) -> bool:
        """Whether this is the kernel's, but for rounding."""
        kernel_OK = kernel.double().flatten(1)
        off = (self.scale * self.h - kernel_OK).abs()
        return bool((off <= ROUNDING[kernel.dtype] * kernel_OK.abs().max()).all())

    def step(self, g_OK: Tensor) -> Tensor:
        """`J J^T G`."""
        by_alpha = self.c * self.h * (self.c * (g_OK * self.h).sum(1, keepdim=True))
        return self._projected(self._projected(g_OK)) + by_alpha

    def _projected(self, a_OK: Tensor) -> Tensor:
        along = self.h * (a_OK * self.h).mean(1, keepdim=True)
        return self.scale * self.r * (a_OK - a_OK.mean(1, keepdim=True) - along)
