"""The numbers of one layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Signal:
    """A layer's input, output or output gradient, over positions (batch and space)."""

    mean: float
    """Mean of the channels' means."""
    variance: float
    """Mean of the channels' variances (biased): what variance transmission is about."""
    second_moment: float
    """Mean square."""
    total_variance: float
    """Variance over positions and channels together."""


@dataclass(frozen=True, eq=False)
class Filters:
    """The numbers of each filter: float64 tensors `(out_channels,)`; those of the backward pass may be None."""

    mean: Tensor
    """`m`."""
    centred: Tensor
    """`Var(z)`, `z = (w - m) . x`."""
    patch_variance: Tensor
    """`Var(xbar)`."""
    average_gradient: Tensor | None = None
    """`mean(dL/dkernel)`."""
    expectation_part: Tensor | None = None
    """`N E[delta] E[xbar]`."""
    covariance_part: Tensor | None = None
    """`N Cov(delta, xbar)`."""
    average_step: Tensor | None = None
    """Mean of the filter's change by a gradient step at learning rate 1, with its sign turned: `average_gradient` in a
    plain layer, 0 in a standardized one."""


@dataclass(frozen=True, eq=False)
class LayerDiagnosis:
    """One layer with a weight. Variances are means over channels; learning rates are those of plain SGD."""

    name: str
    kind: str
    """The layer's class; `Conv2d, pws` if it is marked or computes a standardized kernel."""
    operation: str
    kernel_shape: tuple[int, ...]
    fan_in: int
    groups: int
    calls: int
    positions: int
    """Outputs per channel: batch times space, over all calls."""
    finite: bool
    """Whether every output was finite."""
    finite_kernel: bool
    note: str
    """Why numbers of the backward pass are missing; empty if none are."""

    input: Signal
    output: Signal
    dead_inputs: float
    """Share of the input's channels that were zero at every position, in [0, 1]."""
    transmission: float
    """`Var(output) / Var(input)`."""
    transmission_product: float
    """The product of the transmissions of this layer and all before it, in execution order."""
    centred: float
    """`Var(z)`: what the centred filters make of the output's variance."""
    shift: float
    """`(n m)^2 Var(xbar)`: what the filters' means make of it."""
    covariance: float
    """`2 n m Cov(z, xbar)`; `centred + shift + covariance` is the output's variance."""

    gradient: Signal | None
    """The output gradient `delta = dL/dy`."""
    gradient_transmission: float | None
    """`E[(dL/dx)^2] / E[delta^2]`, through this layer alone."""
    average_gradient: float | None
    """Root mean square over the filters of `mean(dL/dkernel)`."""
    expectation_part: float | None
    """Root mean square over the filters of `N E[delta] E[xbar]`, N the positions."""
    covariance_part: float | None
    """Root mean square over the filters of `N Cov(delta, xbar)`; the two parts add up filter by filter."""
    average_gradient_ratio: float | None
    """Mean over the filters of `(sum s)^2 / (n sum s^2)`, `s` the change of the filter by a gradient step; in [0, 1]."""
    normalized: bool
    """Whether the loss does not depend on the kernel's scale: a norm follows that divides by it. Such a layer can't make
    the variance explode, whatever its step: it is left out of the network's critical learning rate."""
    gate: bool
    """Whether it only scales what other layers make (squeeze and excitation, the queries and keys of attention). Its variance
    is not that of the signal which goes through the network, so no verdict is drawn from it."""
    predicts: bool
    """Whether it is one of several layers whose output no other layer takes: the predictors of a detector. Their means learn
    how rare objects are, and nothing behind them is amplified, so no collapse is read from what changes in them."""
    update_ratio: float | None
    """Norm of the kernel's change by a gradient step at learning rate 1, over the kernel's norm."""
    critical_lr: float | None
    """The learning rate at which the filters' means, moved by one step, add as much variance as the output has:
    `sqrt(Var(y) / mean_o((n sbar_o)^2 Var(xbar)))`; infinity where no step can move them, None for a constant output."""

    filters: Filters

    @property
    def counts(self) -> bool:
        """Whether its variance becomes the network's: it is no gate, and no norm takes its scale back."""
        return not (self.gate or self.normalized)

    @property
    def shift_share(self) -> float:
        """`shift / (shift + centred)`, in [0, 1]: how much of the output's variance is due to the filters' means."""
        return share(self.shift, self.centred)

    @property
    def independent_ratio(self) -> float:
        """`1 / n`, the average-gradient ratio of independent gradients."""
        return 1 / self.fan_in

    @property
    def expectation_share(self) -> float | None:
        """`sum E^2 / (sum E^2 + sum C^2)` over the filters, E and C the two parts of the average gradient; in [0, 1]."""
        if self.expectation_part is None or self.covariance_part is None:
            return None
        squares = self.expectation_part**2, self.covariance_part**2
        return squares[0] / sum(squares) if sum(squares) else 0.0

    def predicted_shift_share(self, lr: float, momentum: float = 0.0, steps: int = 1) -> float | None:
        """The shift share after `steps` steps of SGD at `lr` along today's average step, all else unchanged.

            m_o <- m_o - lr K sbar_o,       K = sum_{k=1..steps} (1 - momentum^k) / (1 - momentum)

        None without a backward pass.
        """
        f = self.filters
        if f.average_step is None:
            return None
        moved = f.mean - lr * travelled(momentum, steps) * f.average_step
        shift = float(((self.fan_in * moved).square() * f.patch_variance).mean())
        return share(shift, self.centred)


def share(shift: float, centred: float) -> float:
    """`shift / (shift + centred)`; 0 where there is neither."""
    total = shift + centred
    return shift / total if total > 0 else total


def travelled(momentum: float, steps: int) -> float:
    """How far SGD goes in `steps` steps along a gradient that stays the same, in units of `lr * gradient`."""
    return sum((1 - momentum**k) / (1 - momentum) for k in range(1, steps + 1))
