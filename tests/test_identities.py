"""The numbers of a diagnosis against first principles, over random layers of every kind, setting and method.

Each reference runs torch's own layer in float64 with a modified kernel (centred filters, a constant 1 / n, one filter's
mean) on what a forward hook saw in an independent run of a copy; only `pws.diagnose` comes from `src`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import reference
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from timm.layers import ScaledStdConv2d, StdConv2d
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import pws
from pws.diagnosis import diagnose
from pws.diagnosis.layer import LayerDiagnosis, Signal

# Torch says that 'same' with an even kernel may copy the input.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

CONVS = ("Conv1d", "Conv2d", "Conv3d")
TRANSPOSED = ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
STANDARDIZED = ("pws", "StdConv2d", "ScaledStdConv2d")
METHODS = ("plain", "weight_norm", *STANDARDIZED)
PROPERTY = partial(settings, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Case:
    """One random layer, its inputs (a shape a call) and what follows it."""

    kind: str
    method: str
    channels: tuple[int, int]
    settings: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    normed: bool
    dead: int
    seed: int
    channels_last: bool = False

    @property
    def row(self) -> str:
        return "identity float64" if self.dtype == torch.float64 else "identity float32"


def per_dim(draw: Callable[..., Any], dims: int, low: int, high: int) -> int | tuple[int, ...]:
    """An integer for all dimensions, or one for each."""
    one = st.integers(low, high)
    value: int | tuple[int, ...] = draw(one if draw(st.booleans()) else st.tuples(*[one] * dims))
    return value


def spread(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else value


@st.composite
def cases(draw: Callable[..., Any], methods: Sequence[str] = METHODS, normed: bool | None = None) -> Case:
    method = draw(st.sampled_from(methods))
    kinds = ("Conv2d",) if method.endswith("StdConv2d") else (*CONVS, *TRANSPOSED, "Linear")
    kind = draw(st.sampled_from(kinds))
    given: dict[str, Any] = {"bias": draw(st.booleans())}
    normed = draw(st.booleans()) if normed is None else normed
    # A batch of one, or none at all, has few positions; BatchNorm needs some.
    batch = draw(st.sampled_from([(3,), (4,)] if normed else [(), (1,), (2,), (4,)]))
    times = draw(st.integers(1, 2))
    if kind == "Linear":
        fan_in = draw(st.integers(3 if method in STANDARDIZED else 1, 6))
        channels = (fan_in, draw(st.integers(1, 5)))
        inner = draw(st.lists(st.integers(2, 3), min_size=int(normed), max_size=2))
        shapes = [(*batch, *inner, fan_in)] * times
    else:
        dims = int(kind[-2])
        groups = draw(st.integers(1, 3))
        kernel, dilation = per_dim(draw, dims, 1, 3), per_dim(draw, dims, 1, 2)
        stride = per_dim(draw, dims, 1, 2)
        reach = [d * (k - 1) for k, d in zip(spread(kernel, dims), spread(dilation, dims), strict=True)]
        entries = math.prod(spread(kernel, dims))
        least = 3 if method in STANDARDIZED else 1
        channels = (groups * draw(st.integers(-(-least // entries), 3)), groups * draw(st.integers(1, 3)))
        given |= {"stride": stride, "dilation": dilation, "groups": groups}
        if kind in TRANSPOSED:
            given["padding"] = tuple(draw(st.integers(0, min(2, r))) for r in reach)
            room = [max(pair) for pair in zip(spread(stride, dims), spread(dilation, dims), strict=True)]
            given["output_padding"] = tuple(draw(st.integers(0, r - 1)) for r in room)
        else:
            names = ["valid", "same"] if set(spread(stride, dims)) == {1} else ["valid"]
            given["padding"] = draw(st.sampled_from(names)) if draw(st.booleans()) else per_dim(draw, dims, 0, 2)
            if method in ("plain", "pws", "weight_norm"):
                given["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        given["kernel_size"] = kernel
        sizes = [tuple(max(3, r + 1) + draw(st.integers(0, 2)) for r in reach) for _ in range(times)]
        shapes = [(*batch, channels[0], *size) for size in sizes]
    return Case(
        kind=kind,
        method=method,
        channels=channels,
        settings=given,
        shapes=tuple(shapes),
        dtype=draw(st.sampled_from([torch.float64, torch.float32])),
        normed=normed,
        dead=draw(st.integers(0, channels[0] - 1)),
        seed=draw(st.integers(0, 2**32 - 1)),
        channels_last=kind.endswith("2d") and draw(st.booleans()),
    )


BASE = Case("Linear", "plain", (4, 3), {"bias": True}, ((4,),), torch.float64, normed=False, dead=0, seed=0)
UNBATCHED = BASE
"""A single sample: one position."""
UNBATCHED_TWICE = replace(BASE, shapes=((4,), (4,)))
ONE_POSITION = Case("Conv1d", "plain", (1, 1), {"kernel_size": 3}, ((1, 3),), torch.float32, False, dead=0, seed=0)
"""Its variances are 0 and may not fall below."""
THREE_ENTRIES = Case(
    "ConvTranspose1d", "pws", (3, 2), {"kernel_size": 1, "bias": False}, ((3, 3), (3, 3)), torch.float32, False, 0, 8862
)
"""Of a step of three entries most cancels."""


class Net(nn.Module):
    """`norm(layer(relu(scale x)))` for each input x; a channel whose scale is 0 is dead."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.channel_dim = -1 if case.kind == "Linear" else -1 - int(case.kind[-2])
        owner: Any = {"pws": pws, "StdConv2d": None, "ScaledStdConv2d": None}.get(case.method, nn)
        build = getattr(owner, case.kind) if owner else {"StdConv2d": StdConv2d}.get(case.method, ScaledStdConv2d)
        layer = build(*case.channels, **case.settings)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter) + 0.1)
        self.layer = weight_norm(layer) if case.method == "weight_norm" else layer
        if case.method == "weight_norm":
            with torch.no_grad():  # away from its initial values, at which g is the norm of v
                self.layer.parametrizations.weight.original0.mul_(1.3).add_(0.2)
        self.scale = nn.Parameter(torch.rand(case.channels[0]) + 0.5)
        with torch.no_grad():
            self.scale[: case.dead] = 0
        self.norm = nn.BatchNorm1d(case.channels[1]) if case.normed else nn.Identity()
        self.to(case.dtype)
        if case.channels_last:
            self.to(memory_format=torch.channels_last)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        scale = self.scale.view(-1, *[1] * (-1 - self.channel_dim))
        return [self.norm(rows(self.layer(torch.relu(scale * x)), self.channel_dim)) for x in inputs]


def loss(outputs: list[Tensor], targets: list[Tensor]) -> Tensor:
    return sum((F.mse_loss(o, t) for o, t in zip(outputs, targets, strict=True)), torch.zeros(()))


def rows(signal: Tensor, channel_dim: int) -> Tensor:
    """As `(positions, channels)`."""
    return signal.movedim(channel_dim, -1).reshape(-1, signal.shape[channel_dim])


@dataclass(frozen=True)
class Reference:
    """What an independent run saw, in float64, with torch's own layer to run again with another kernel."""

    plain: nn.Module
    kernel: Tensor
    change: Tensor
    """Of the kernel, by the gradient as a change of the parameters."""
    inputs: list[Tensor]
    """What the operation is called with: padded where torch pads beforehand."""
    outputs: list[Tensor]
    deltas: list[Tensor]
    kernel_gradient: Tensor
    input_gradients: list[Tensor]
    channel_dim: int

    def filters(self, kernel: Tensor) -> Tensor:
        """`(O, n)`."""
        if not isinstance(self.plain, nn.modules.conv._ConvTransposeNd):
            return kernel.flatten(1)
        return kernel.unflatten(0, (self.plain.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)

    def of_filters(self, values: Tensor) -> Tensor:
        """A kernel whose filters are constant, one value each."""
        shape = self.kernel.shape
        if not isinstance(self.plain, nn.modules.conv._ConvTransposeNd):
            return values.view(-1, *[1] * (len(shape) - 1)).expand(shape)
        groups = self.plain.groups
        grouped = values.view(groups, 1, shape[1], *[1] * (len(shape) - 2))
        return grouped.expand(groups, shape[0] // groups, *shape[1:]).reshape(shape)

    def run(self, kernel: Tensor) -> Tensor:
        """Its `(positions, O)` with another kernel and no bias, over all calls."""
        return torch.cat([rows(apply(self.plain, x, kernel), self.channel_dim) for x in self.inputs])

    @property
    def n(self) -> int:
        return self.filters(self.kernel).shape[1]

    @property
    def means(self) -> Tensor:
        return self.filters(self.kernel).sum(1) / self.n

    def xbar(self) -> Tensor:
        return self.run(torch.full_like(self.kernel, 1 / self.n))

    def z(self) -> Tensor:
        return self.run(self.kernel - self.of_filters(self.means))

    def rows_of(self, name: str) -> Tensor:
        return torch.cat([rows(t, self.channel_dim) for t in getattr(self, name)])


def apply(plain: nn.Module, x: Tensor, kernel: Tensor) -> Tensor:
    """Torch's layer on an input that is padded already, unless it pads with zeros."""
    result: Tensor = torch.func.functional_call(plain, {"weight": kernel}, (x,))
    return result


def kernel_function(case: Case, layer: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    """The kernel as each method's paper has it, of the layer's parameters."""

    def standardized(weight: Tensor) -> Tensor:
        flat = weight.flatten(1)
        centred = flat - flat.mean(1, keepdim=True)
        return (centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()).view_as(weight)

    def kernel(p: dict[str, Tensor]) -> Tensor:
        if case.method == "plain":
            return p["weight"]
        if case.method == "weight_norm":
            g, v = p["parametrizations.weight.original0"], p["parametrizations.weight.original1"]
            return g * v / v.square().sum(list(range(1, v.dim())), keepdim=True).sqrt()
        if case.method == "pws":
            constants = {"gain": layer.gain, "gamma": layer.gamma}
            if case.kind in TRANSPOSED:
                return reference.transposed_kernel(p["weight"], p["alpha"], layer.groups, **constants)
            return reference.kernel(p["weight"], p["alpha"], **constants)
        scale = 1 if case.method == "StdConv2d" else p["gain"] * p["weight"][0].numel() ** -0.5
        return scale * standardized(p["weight"])

    return kernel


def observe(case: Case, net: Net, inputs: list[Tensor], targets: list[Tensor]) -> tuple[Reference, Net]:
    """An independent run of a copy, which then holds the gradients."""
    net = deepcopy(net)
    seen: list[tuple[Tensor, Tensor]] = []

    def see(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        output.retain_grad()
        seen.append((args[0], output))

    with net.layer.register_forward_hook(see):
        loss(net(*inputs), targets).backward()
    arguments = {k: v for k, v in case.settings.items() if k not in ("bias", "padding_mode")}
    padding = getattr(net.layer, "_reversed_padding_repeated_twice", None)
    mode = case.settings.get("padding_mode", "zeros")
    if mode != "zeros":
        arguments["padding"] = 0
    plain = getattr(nn, case.kind)(*case.channels, bias=False, dtype=torch.float64, **arguments)
    wide = [x.detach().double() for x, _ in seen]
    if mode != "zeros":
        wide = [F.pad(x, padding, mode=mode) for x in wide]
    parameters = {name: p.detach().double() for name, p in net.layer.named_parameters()}
    gradients = {name: p.grad.double() for name, p in net.layer.named_parameters() if p.grad is not None}
    function = kernel_function(case, net.layer)
    used = {name: p for name, p in parameters.items() if name != "bias"}
    kernel, change = torch.func.jvp(function, (used,), ({name: gradients[name] for name in used},))
    deltas = [y.grad.double() for _, y in seen]
    leaves = [kernel.clone().requires_grad_(), *[x.clone().requires_grad_() for x in wide]]
    pairs = zip(leaves[1:], deltas, strict=True)
    value = sum((apply(plain, x, leaves[0]) * delta).sum() for x, delta in pairs)
    found = torch.autograd.grad(value, leaves)
    return (
        Reference(
            plain=plain,
            kernel=kernel,
            change=change,
            inputs=wide,
            outputs=[y.detach().double() for _, y in seen],
            deltas=deltas,
            kernel_gradient=found[0],
            input_gradients=list(found[1:]),
            channel_dim=net.channel_dim,
        ),
        net,
    )


def setup(case: Case) -> tuple[Net, Any, LayerDiagnosis, Reference, Net]:
    torch.manual_seed(case.seed)
    net = Net(case)
    inputs = [torch.randn(shape, dtype=case.dtype) + 0.5 for shape in case.shapes]
    if case.channels_last:
        inputs = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs]
    with torch.no_grad():
        targets = [torch.randn_like(o) - 0.7 for o in deepcopy(net)(*inputs)]
    batch = (tuple(inputs), targets)
    diagnosis = diagnose(net, batch, loss)
    assert [layer.name for layer in diagnosis.layers] == ["layer"]
    return (net, batch, diagnosis.layers[0], *observe(case, net, inputs, targets))


def close(actual: Tensor | float | None, expected: Tensor | float, scale: Tensor | float, row: str) -> None:
    """Equal to within the row's tolerance times a scale: that of the terms which `expected` is a difference of."""
    assert actual is not None
    scale = torch.as_tensor(scale, dtype=torch.float64)
    inverse = torch.where(scale > 0, 1 / scale, 1.0)
    values = [torch.as_tensor(value, dtype=torch.float64) * inverse for value in (actual, expected)]
    assert_close(*values, row)


def variance(signal: Tensor) -> Tensor:
    return signal.var(0, correction=0)


def same_signal(signal: Signal | None, expected: Tensor, row: str) -> None:
    assert signal is not None
    square = expected.square().mean()
    close(signal.mean, expected.mean(), square.sqrt(), row)
    close(signal.variance, variance(expected).mean(), square, row)
    close(signal.second_moment, square, square, row)
    close(signal.total_variance, expected.var(correction=0), square, row)
    assert min(signal.variance, signal.second_moment, signal.total_variance) >= 0


@PROPERTY(max_examples=35)
@given(cases())
@example(UNBATCHED)
@example(UNBATCHED_TWICE)
@example(ONE_POSITION)
def test_the_split_of_the_output_variance(case: Case) -> None:
    _, _, layer, ref, _ = setup(case)
    means, xbar, z = ref.means, ref.xbar(), ref.z()
    shift = (ref.n * means).square() * variance(xbar)
    with_shift = ref.run(ref.of_filters(means))
    covariance = 2 * ((z - z.mean(0)) * (with_shift - with_shift.mean(0))).mean(0)
    scale = variance(z) + shift
    row = case.row
    close(layer.filters.mean, means, ref.kernel.abs().max(), row)
    close(layer.filters.centred, variance(z), scale, row)
    close(layer.filters.patch_variance, variance(xbar), xbar.square().mean(0), row)
    close(layer.centred, variance(z).mean(), scale.mean(), row)
    close(layer.shift, shift.mean(), scale.mean(), row)
    close(layer.covariance, covariance.mean(), scale.mean(), row)
    close(layer.centred + layer.shift + layer.covariance, variance(ref.rows_of("outputs")).mean(), scale.mean(), row)
    close(layer.shift_share, shift.mean() / scale.mean() if scale.mean() else 0.0, 1, row)
    assert 0 <= layer.shift_share <= 1
    if case.method in STANDARDIZED:
        assert layer.shift_share < (1e-20 if case.dtype == torch.float64 else 1e-8)


@PROPERTY(max_examples=15)
@given(cases())
@example(UNBATCHED)
@example(UNBATCHED_TWICE)
@example(ONE_POSITION)
def test_the_input_the_output_and_what_is_transmitted(case: Case) -> None:
    _, _, layer, ref, _ = setup(case)
    x, y = ref.rows_of("inputs"), ref.rows_of("outputs")
    same_signal(layer.input, x, case.row)
    same_signal(layer.output, y, case.row)
    assert layer.dead_inputs == pytest.approx(float((x == 0).all(0).double().mean()))
    ratio = variance(y).mean() / variance(x).mean() if variance(x).any() else 0.0 if not variance(y).any() else math.inf
    close(layer.transmission, ratio, ratio, case.row)
    assert layer.transmission_product == layer.transmission
    assert (layer.fan_in, layer.groups) == (ref.n, case.settings.get("groups", 1))
    assert (layer.calls, layer.positions) == (len(case.shapes), len(y))
    assert layer.kernel_shape == tuple(ref.kernel.shape)
    assert layer.independent_ratio == 1 / ref.n
    names = {"Linear": "linear"}
    assert layer.operation == names.get(case.kind, case.kind.lower().replace("convtranspose", "conv_transpose"))
    assert layer.finite
    assert layer.finite_kernel


@PROPERTY(max_examples=35)
@given(cases())
@example(UNBATCHED)
@example(UNBATCHED_TWICE)
@example(ONE_POSITION)
def test_the_output_gradient_and_the_average_gradient(case: Case) -> None:
    _, _, layer, ref, _ = setup(case)
    delta, xbar = ref.rows_of("deltas"), ref.xbar()
    same_signal(layer.gradient, delta, case.row)
    magnitude = (delta.abs() * xbar.abs()).sum(0)  # of the terms of the sum over positions
    f, row = layer.filters, case.row
    average = ref.filters(ref.kernel_gradient).mean(1)
    expectation = len(delta) * delta.mean(0) * xbar.mean(0)
    covariance = ((delta - delta.mean(0)) * (xbar - xbar.mean(0))).sum(0)
    close(f.average_gradient, average, magnitude, row)
    close(f.expectation_part, expectation, magnitude, row)
    close(f.covariance_part, covariance, magnitude, row)
    close(f.expectation_part + f.covariance_part, f.average_gradient, magnitude, row)
    for total, filters in (
        *((layer.average_gradient, average), (layer.expectation_part, expectation)),
        (layer.covariance_part, covariance),
    ):
        close(total, filters.square().mean().sqrt(), magnitude.square().mean().sqrt(), row)
    squares = expectation.square().mean(), covariance.square().mean()
    if min(sum(squares), magnitude.square().mean() / 1e6) > 0 and sum(squares) > magnitude.square().mean() / 1e6:
        close(layer.expectation_share, squares[0] / sum(squares), 1e3, row)
    gradients = torch.cat([g.flatten() for g in ref.input_gradients])
    ratio = gradients.square().mean() / delta.square().mean() if delta.any() else 0.0
    close(layer.gradient_transmission, ratio, ratio, row)
    assert layer.note == ("its output is constant" if layer.output.variance == 0 else "")


@PROPERTY(max_examples=15)
@given(cases(normed=True))
def test_batch_norm_leaves_no_expectation(case: Case) -> None:
    _, _, layer, ref, _ = setup(case)
    magnitude = (ref.rows_of("deltas").abs() * ref.xbar().abs()).sum(0)
    row = case.row if case.dtype == torch.float64 else "batch norm"
    close(layer.filters.expectation_part, torch.zeros(case.channels[1]), magnitude, row)
    assert magnitude.max() > 0


@PROPERTY(max_examples=30)
@given(cases(methods=("plain", "weight_norm")), st.floats(0.1, 3), st.integers(1, 4), st.sampled_from([0.0, 0.9]))
def test_the_step_the_critical_rate_and_the_forecast(case: Case, factor: float, steps: int, momentum: float) -> None:
    net, batch, layer, ref, copy = setup(case)
    row, f, change = case.row, layer.filters, ref.filters(ref.change)
    assert f.average_step is not None
    scale = change.abs().mean(1)
    close(f.average_step, change.mean(1), scale, row)
    if case.method == "plain":
        assert copy.layer.weight.grad is not None
        gradient = ref.filters(copy.layer.weight.grad.double())
        close(f.average_step, f.average_gradient, scale, row)
    else:
        names = [name for name, _ in copy.layer.named_parameters() if name != "bias"]
        parameters = {name: copy.layer.get_parameter(name).detach().double() for name in names}
        gradients = {name: copy.layer.get_parameter(name).grad.double() for name in names}
        norms = [sum(t.square().sum() for t in tensors.values()).sqrt() for tensors in (parameters, gradients)]
        eps = float(1e-5 * norms[0] / norms[1]) if norms[1] else 1.0
        kernel = kernel_function(case, copy.layer)
        ends = [kernel({name: parameters[name] + s * eps * gradients[name] for name in names}) for s in (-1, 1)]
        gradient = ref.filters(ends[1] - ends[0]) / (2 * eps)
        unit = norms[1] if case.dtype == torch.float64 else scale
        close(f.average_step, gradient.mean(1), unit, "finite difference" if case.dtype == torch.float64 else row)
        gradient = change
    ratios = [float(g.sum() ** 2 / (len(g) * (g**2).sum())) if g.any() else 0.0 for g in gradient]
    close(layer.average_gradient_ratio, sum(ratios) / len(ratios), 1, row)
    assert 0 <= layer.average_gradient_ratio <= 1 + 1e-12
    norm = ref.kernel.norm()
    close(layer.update_ratio, gradient.norm() / norm, gradient.norm() / norm, row)

    y = ref.rows_of("outputs")
    xbar = ref.xbar()
    per_unit = ((ref.n * f.average_step).square() * variance(xbar)).mean()
    noise = (ref.n * f.average_step).square() * xbar.square().mean(0)
    assume(per_unit > 1e-6 * noise.mean() > 0)  # all positions alike: no step can add variance
    assert layer.critical_lr is not None
    critical = (variance(y).mean() / per_unit).sqrt()
    close(layer.critical_lr, critical, critical, row)
    added = ref.run(ref.kernel - layer.critical_lr * ref.of_filters(f.average_step)) - ref.run(ref.kernel)
    close(variance(added).mean(), variance(y).mean(), variance(y).mean(), row)

    assume(0 < critical < math.inf)
    lr = factor * layer.critical_lr
    means = nn.Parameter(f.mean.clone())
    optimizer = torch.optim.SGD([means], lr=lr, momentum=momentum)
    for _ in range(steps):
        means.grad = f.average_step.clone()
        optimizer.step()
    predicted = layer.predicted_shift_share(lr, momentum, steps)
    shift = ((ref.n * means.detach()).square() * variance(xbar)).mean()
    close(predicted, shift / (shift + variance(ref.z()).mean()), 1, row)
    assert 0 <= predicted <= 1
    if case.method == "plain":  # one real step of the filters' means, seen by a second diagnosis
        moved = deepcopy(net)
        with torch.no_grad():
            moved.layer.weight -= lr * ref.of_filters(ref.filters(copy.layer.weight.grad.double()).mean(1))
        after = diagnose(moved, batch, loss, lr=lr).layers[0]
        close(layer.predicted_shift_share(lr), after.shift_share, 1, row)


@PROPERTY(max_examples=20)
@given(cases(methods=STANDARDIZED))
@example(THREE_ENTRIES)
def test_no_step_shifts_a_standardized_filter(case: Case) -> None:
    _, _, layer, ref, _ = setup(case)
    assert layer.critical_lr == math.inf
    assert layer.filters.average_step.tolist() == [0] * case.channels[1]
    assert layer.average_gradient_ratio < (1e-12 if case.dtype == torch.float64 else 1e-6)
    assert layer.predicted_shift_share(1e3, 0.9, 10) < 1e-6
    norm = ref.change.norm() / ref.kernel.norm()
    # Of a standardized kernel's change most of the gradient is projected out.
    parts = [ref.kernel_gradient.norm() / ref.kernel.norm(), norm]
    close(layer.update_ratio, norm, max(parts), case.row)
    # The gradient by the kernel itself has a mean, which the statistics above must not have taken from zeros.
    assert layer.filters.average_gradient.abs().max() > 0


def by_hand(
    x: Tensor, kernel: Tensor, position: tuple[int, int, int], channel: int, stride: int, groups: int
) -> Tensor:
    """The entries of a padded `(batch, C, H, W)` that a filter of a convolution meets, `(n,)`."""
    b, i, j = position
    size, per_group = kernel.shape[2], kernel.shape[1]
    first = channel // (kernel.shape[0] // groups) * per_group
    entries = [
        x[b, first + c, i * stride + u, j * stride + v]
        for c, u, v in product(range(per_group), range(size), range(size))
    ]
    return torch.stack(entries)


def test_a_grouped_convolution_patch_by_patch() -> None:
    """All of the forward split once more with no convolution in the reference."""
    layer = nn.Conv2d(4, 6, 2, stride=2, padding=1, padding_mode="reflect", groups=2, dtype=torch.float64)
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64) + 1
    target = torch.randn(3, 6, 3, 3, dtype=torch.float64)
    found = diagnose(layer, (x, target), F.mse_loss).layers[0]
    y = layer(x).detach()
    delta = 2 * (y - target) / y.numel()
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    for o, entries in enumerate(layer.weight.detach().flatten(1)):
        where = list(product(range(3), range(3), range(3)))
        patches = torch.stack([by_hand(padded, layer.weight, p, o, 2, 2) for p in where])
        deltas = torch.stack([delta[b, o, i, j] for b, i, j in where])
        m, xbar = entries.sum() / 8, patches.sum(1) / 8
        assert_close(found.filters.mean[o], m, "float64")
        assert_close(found.filters.patch_variance[o], variance(xbar), "float64")
        assert_close(found.filters.centred[o], variance(patches @ (entries - m)), "float64")
        assert_close(found.filters.average_gradient[o], (deltas @ patches).sum() / 8, "float64")
        assert_close(found.filters.expectation_part[o], deltas.sum() * xbar.sum() / 27, "float64")


def test_a_transposed_convolution_entry_by_entry() -> None:
    """Scattered by hand: position p of the input adds its value times the kernel at `2 p + k - 1` of the output."""
    layer = nn.ConvTranspose1d(4, 2, 3, stride=2, padding=1, output_padding=1, groups=2, dtype=torch.float64)
    x = torch.randn(2, 4, 4, dtype=torch.float64) + 1
    found = diagnose(layer, x, lambda y: y.pow(3).sum()).layers[0]
    weight = layer.weight.detach()  # (4, 1, 3): inputs 2o and 2o + 1 make output o
    for o in range(2):
        m = weight[2 * o : 2 * o + 2].sum() / 6
        z, xbar = torch.zeros(2, 10), torch.zeros(2, 10)
        z, xbar = z.double(), xbar.double()
        for b, c, p, k in product(range(2), (2 * o, 2 * o + 1), range(4), range(3)):
            z[b, 2 * p + k] += x[b, c, p] * (weight[c, 0, k] - m)
            xbar[b, 2 * p + k] += x[b, c, p] / 6
        z, xbar = z[:, 1:9].flatten(), xbar[:, 1:9].flatten()
        y = z + 6 * m * xbar + layer.bias[o].detach()
        assert_close(layer(x)[:, o].flatten(), y, "float64")
        assert_close(found.filters.mean[o], m, "float64")
        assert_close(found.filters.centred[o], variance(z), "float64")
        assert_close(found.filters.patch_variance[o], variance(xbar), "float64")
        assert_close(found.filters.average_gradient[o], (3 * y**2 * xbar).sum(), "float64")


def test_transmission_product_runs_over_the_layers_in_order() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(96, 3)).double()
    x = torch.randn(8, 1, 8, 8, dtype=torch.float64)
    layers = diagnose(model, x, lambda y: y.square().mean()).layers
    signals = [(x, a := model[0](x)), (b := model[1](a), c := model[2](b)), (d := model[3](c), model[4](d))]
    product_so_far = 1.0
    for layer, (before, after) in zip(layers, signals, strict=True):
        ratio = variance(rows(after, 1)).mean() / variance(rows(before, 1)).mean()
        product_so_far *= float(ratio.detach())
        assert_close(layer.transmission, ratio, "float64")
        assert_close(layer.transmission_product, product_so_far, "float64")


def test_an_input_that_is_zero_everywhere() -> None:
    layer = diagnose(nn.Conv2d(2, 3, 3), torch.zeros(2, 2, 5, 5), lambda y: y.square().sum()).layers[0]
    assert (layer.dead_inputs, layer.transmission, layer.shift_share, layer.shift) == (1, 0, 0, 0)
    assert layer.critical_lr is None
    assert layer.average_gradient == 0
    assert layer.average_gradient_ratio == 0
