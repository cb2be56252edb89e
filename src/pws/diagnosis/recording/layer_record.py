"""What one layer did in one pass: the statistics of each of its calls, forward and backward.

Shape letters: O filters (output channels), K entries of a filter, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pws.diagnosis.recording.moments import Moments, batched, centre, channel_sums, is_finite, wide
from pws.diagnosis.recording.step_map import StepMap
from pws.diagnosis.recording.weighted_operation import Call, Layout, split_channels


@dataclass
class Backward:
    """The statistics of a call's output gradient delta."""

    delta: Moments
    delta_patch: Tensor
    """`sum_p delta(p) xbar(p)`, float64 `(O,)`."""


@dataclass
class CallRecord:
    """The statistics of one call."""

    input: Moments
    dead: Tensor
    """Which input channels were zero everywhere, `(C,)`."""
    output: Moments
    centred: Moments
    """The moments of `z = y - n m xbar`, beta left in: a constant."""
    shift: Moments
    """The moments of `n m xbar`."""
    covariance: Tensor
    """`Cov(z, n m xbar)`."""
    patch: Moments
    """The moments of `xbar`, that of its group repeated for each filter."""
    finite: bool
    backward: Backward | None = None
    """Filled in by the backward pass."""
    input_gradient_squares: float | None = None
    """The sum of squares of the gradient by the input, through this layer alone."""
    kernel_gradient: Tensor | None = None
    """The mean over each filter of the gradient by the kernel, `(O,)`."""
    radial: tuple[float, float] | None = None
    """The gradient by the kernel along the kernel, `sum_o g_o . k_o`, and what it is compared with,
    `sqrt(sum_o |g_o|^2 |k_o|^2)`."""


@dataclass
class LayerRecord:
    """All calls of a layer in one pass, in order."""

    name: str
    kind: str
    operation: str
    kernel_shape: tuple[int, ...]
    dtype: torch.dtype
    fan_in: int
    filter_mean: Tensor
    """`m`, `(O,)`."""
    kernel_norm: float
    layout: Layout
    trained: bool = False
    """Whether a call's kernel hangs on trained parameters."""
    step_map: StepMap | None = None
    gate: bool = False
    """Whether it only scales what other layers make."""
    predicts: bool = False
    """Whether it is one of several layers whose output no other takes."""
    calls: list[CallRecord] = field(default_factory=list)

    @property
    def finite(self) -> bool:
        """Whether every output was."""
        return all(call.finite for call in self.calls)


def record_forward(call: Call, output: Tensor, patch: Tensor) -> CallRecord:
    """The statistics of a call's input and output; `patch` is its patch average."""
    dim, filters = call.channel_dim, call.filters(wide(call.kernel))
    x, y = batched(wide(call.input)), batched(wide(output))
    inputs = centre(x, dim)[0]
    outputs = centre(y, dim)[0]
    of_patch, centred_patch = centre(patch, dim)
    # n m, shaped like the output with one entry per channel, and the patch average of each filter's group.
    nm_O = filters.sum(1)
    per_group = nm_O.numel() // call.groups
    nm = nm_O.view([-1 if d == dim % y.dim() else 1 for d in range(y.dim())])
    z = y - nm * patch.repeat_interleave(per_group, dim) if call.groups > 1 else y - nm * patch
    of_z, centred_z = centre(z, dim)
    with_patch = split_channels(centred_z, dim, call.groups) * split_channels(centred_patch, dim, call.groups)
    with_patch = with_patch.flatten(dim - 1, dim)
    nm_O = nm_O.double()
    of_patch = Moments(
        of_patch.count, of_patch.mean.repeat_interleave(per_group), of_patch.variance.repeat_interleave(per_group)
    )
    return CallRecord(
        input=inputs,
        dead=inputs.second_moment == 0,
        output=outputs,
        centred=of_z,
        shift=Moments(of_patch.count, nm_O * of_patch.mean, nm_O.square() * of_patch.variance),
        covariance=nm_O * channel_sums(with_patch, dim).flatten() / of_patch.count,
        patch=of_patch,
        finite=is_finite(y),
    )


def record_backward(record: CallRecord, layout: Layout, patch: Tensor, delta: Tensor) -> None:
    """Add the sums of the output gradient to a call's record."""
    dim = layout.channel_dim
    delta = batched(wide(delta))
    grouped = split_channels(delta, dim, layout.groups) * split_channels(patch, dim, layout.groups)
    record.backward = Backward(
        delta=centre(delta, dim)[0],
        delta_patch=channel_sums(grouped.flatten(dim - 1, dim), dim).flatten(),
    )
