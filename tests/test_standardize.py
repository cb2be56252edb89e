"""`pws.standardize` against the float64 reference: values, gradients, dtypes, layouts, transforms and errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCES, assert_close
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import pws

SHAPES = [(5, 7), (4, 3, 5), (6, 2, 3, 3), (3, 2, 2, 3, 2)]
# The exact gain: the quadrature behind the name "relu" is 3e-11 off, which the float64 rows would see.
standardize = partial(pws.standardize, gain=reference.RELU_GAIN)
PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)


def make(shape: tuple[int, ...], **factory: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A weight with a mean and an alpha with either sign, both leaves, and a gradient of the kernel."""
    weight = (torch.randn(shape, **factory) * 0.3 + 0.2).requires_grad_()
    alpha = (torch.randn(shape[0], **factory) + 0.5).requires_grad_()
    return weight, alpha, torch.randn(shape, **factory)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_alpha", [True, False])
@pytest.mark.parametrize(("gamma", "relative"), [(1e-3, False), (0.05, False), (0.05, True), (0.0, False)])
def test_parity_in_float64(shape: tuple[int, ...], with_alpha: bool, gamma: float, relative: bool) -> None:
    weight, some_alpha, g = make(shape, dtype=torch.float64)
    alpha = some_alpha if with_alpha else None
    leaves = [weight, some_alpha] if with_alpha else [weight]
    ours = standardize(weight, alpha, gamma=gamma, relative_gamma=relative)
    theirs = reference.kernel(weight, alpha, gamma=gamma, relative=relative)
    assert ours.dtype == torch.float64
    assert_close(ours, theirs, "float64")
    published = reference.gradients(weight, alpha, g, gamma=gamma, relative=relative)
    for mine, traced, formula in zip(grad(ours, leaves, g), grad(theirs, leaves, g), published, strict=False):
        assert_close(mine, traced, "float64")
        assert_close(mine, formula, "float64")


@pytest.mark.parametrize(("gain", "number"), [("relu", reference.RELU_GAIN), ("linear", 1.0), (0.7, 0.7)])
def test_gain_scales_the_kernel(gain: float | str, number: float) -> None:
    weight, alpha, _ = make((5, 7), dtype=torch.float64)
    assert_close(pws.standardize(weight, alpha, gain=gain), reference.kernel(weight, alpha, gain=number), "quadrature")


def test_defaults_are_the_relu_gain_and_gamma_1e_3() -> None:
    weight, _, _ = make((5, 7), dtype=torch.float64)
    assert_close(pws.standardize(weight), reference.kernel(weight, gain=reference.RELU_GAIN, gamma=1e-3), "quadrature")


@pytest.mark.parametrize("with_alpha", [True, False])
@pytest.mark.parametrize(("gamma", "relative"), [(0.1, False), (0.1, True), (0.0, False)])
def test_gradcheck_and_gradgradcheck(with_alpha: bool, gamma: float, relative: bool) -> None:
    weight, alpha, _ = make((3, 2, 2), dtype=torch.float64)

    def kernel(*leaves: Tensor) -> Tensor:
        return standardize(*leaves, gamma=gamma, relative_gamma=relative)

    leaves = (weight, alpha) if with_alpha else (weight,)
    assert gradcheck(kernel, leaves, check_forward_ad=True)
    assert gradgradcheck(kernel, leaves, check_fwd_over_rev=True)


LONG = [(1, 2), (3, 9), (64, 27), (7, 1023), (4096, 9), (5, 4608), (2, 25088)]


@pytest.mark.parametrize("with_alpha", [True, False])
@pytest.mark.parametrize("shape", LONG, ids=str)
def test_float32_of_every_length(shape: tuple[int, int], with_alpha: bool) -> None:
    weight, some_alpha, g = make(shape)
    alpha = some_alpha if with_alpha else None
    kernel = standardize(weight, alpha)
    assert kernel.dtype == torch.float32
    assert_close(kernel, reference.kernel(weight, alpha), "kernel float32")
    leaves = [weight, some_alpha] if with_alpha else [weight]
    for mine, formula in zip(grad(kernel, leaves, g), reference.gradients(weight, alpha, g), strict=False):
        scale = formula.abs().max().clamp(min=1.0)
        assert_close(mine / scale, formula / scale, "kernel float32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (3e3, 0), (1, 30), (1e-3, 0)])
def test_half_precision_takes_statistics_in_float32(dtype: torch.dtype, scale: float, shift: float) -> None:
    row = str(dtype).removeprefix("torch.")
    weight, alpha, g = (t.detach() for t in make((4, 8, 3, 3)))
    weight = (weight * scale + shift).to(dtype).requires_grad_()
    alpha = alpha.to(dtype).requires_grad_()
    ours = standardize(weight, alpha, gamma=1e-4)
    assert ours.dtype == dtype
    assert_close(ours, reference.kernel(weight, alpha, gamma=1e-4), row)
    g = g.to(dtype)
    for mine, formula in zip(
        grad(ours, [weight, alpha], g), reference.gradients(weight, alpha, g, gamma=1e-4), strict=True
    ):
        assert mine.dtype == dtype
        assert_close(mine, formula, row)


def test_overflowing_squares_are_really_tested() -> None:
    """The case above with scale 3e3 cannot be computed in float16, so the test before this one can fail."""
    weight = (make((4, 8, 3, 3))[0] * 3e3).half()
    assert weight.square().isinf().any()


def test_float32_alpha_on_a_half_weight_keeps_its_own_gradient_dtype() -> None:
    weight, alpha, g = make((4, 9))
    half = weight.detach().bfloat16().requires_grad_()
    grads = grad(standardize(half, alpha), [half, alpha], g.bfloat16())
    assert [t.dtype for t in grads] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    ("weight_dtype", "kernel_dtype"), [(torch.float32, torch.bfloat16), (torch.float64, torch.float64)], ids=str
)
def test_autocast(weight_dtype: torch.dtype, kernel_dtype: torch.dtype) -> None:
    weight, alpha, g = make((4, 8, 3, 3), dtype=weight_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        kernel = standardize(weight, alpha)
    assert kernel.dtype == kernel_dtype
    row = str(kernel_dtype).removeprefix("torch.")
    assert_close(kernel, reference.kernel(weight, alpha), row)
    grads = grad(kernel, [weight, alpha], g.to(kernel_dtype))
    assert [t.dtype for t in grads] == [weight_dtype] * 2
    # The gradient that arrives is rounded to the kernel's dtype; from there on all is in the weight's own.
    for mine, formula in zip(grads, reference.gradients(weight, alpha, g.to(kernel_dtype)), strict=True):
        assert_close(mine, formula, str(weight_dtype).removeprefix("torch."))


def test_autocast_switched_off_inside_leaves_the_dtype() -> None:
    weight = make((4, 9))[0]
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert standardize(weight).dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "layout"), [((6, 4, 3, 2), torch.channels_last), ((3, 4, 2, 3, 2), torch.channels_last_3d)], ids=str
)
def test_channels_last_stays(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    weight, alpha, g = make(shape, dtype=torch.float64)
    last = weight.detach().to(memory_format=layout).requires_grad_()
    kernel = standardize(last, alpha)
    (grad_weight,) = grad(kernel, last, g.to(memory_format=layout))
    for mine, expected in [
        (kernel, reference.kernel(weight, alpha)),
        (grad_weight, reference.gradients(weight, alpha, g)[0]),
    ]:
        assert mine.is_contiguous(memory_format=layout)
        assert not mine.is_contiguous()
        assert_close(mine, expected, "float64")


class Seen(TorchDispatchMode):
    """The names of the operators that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((6, 4, 3, 2), torch.contiguous_format),
        ((6, 4, 3, 2), torch.channels_last),
        ((3, 4, 2, 3, 2), torch.channels_last_3d),
    ],
    ids=str,
)
def test_batch_norm_each_way_and_no_copy(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    weight, alpha, g = make(shape)
    weight, g = weight.detach().to(memory_format=layout).requires_grad_(), g.to(memory_format=layout)
    with Seen() as seen:
        grad(standardize(weight, alpha), [weight, alpha], g)
    assert seen.names >= {"native_batch_norm", "native_batch_norm_backward"}
    assert seen.names.isdisjoint({"clone", "copy_", "_to_copy"})


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels swapped": lambda base: base.transpose(0, 1),
    "entries swapped": lambda base: base.transpose(1, 3),
    "strided slice": lambda base: base[1::2, ::2, :, 1:],
    "filters last": lambda base: base.permute(3, 0, 1, 2),
    "expanded": lambda base: base[:, :1].expand(-1, 3, -1, -1),
}


@pytest.mark.parametrize("view", VIEWS)
def test_non_contiguous_weights(view: str) -> None:
    base = torch.randn(6, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = VIEWS[view](base)
    assert not weight.is_contiguous()
    alpha = torch.randn(weight.shape[0], 2, dtype=torch.float64)[:, 0]
    g = torch.randn(weight.shape, dtype=torch.float64)
    ours, theirs = standardize(weight, alpha), reference.kernel(weight, alpha)
    assert_close(ours, theirs, "float64")
    assert_close(grad(ours, base, g)[0], grad(theirs, base, g)[0], "float64")


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_the_defaults_for_new_tensors_are_not_for_kernels(default: torch.dtype) -> None:
    weight, alpha, g = make((6, 9))
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            kernels = standardize(weight, alpha), standardize(weight)
            grads = grad(kernels[0], [weight, alpha], g)
    finally:
        torch.set_default_dtype(before)
    for kernel, some_alpha in zip(kernels, (alpha, None), strict=True):
        assert kernel.dtype == torch.float32
        assert_close(kernel, reference.kernel(weight, some_alpha), "float32")
    for mine, formula in zip(grads, reference.gradients(weight, alpha, g), strict=True):
        assert_close(mine, formula, "float32")


@pytest.mark.parametrize("with_alpha", [True, False])
def test_a_weight_without_filters_has_an_empty_kernel(with_alpha: bool) -> None:
    weight, alpha, g = make((0, 3, 2))
    kernel = standardize(weight, alpha if with_alpha else None)
    assert kernel.shape == weight.shape
    assert grad(kernel, weight, g)[0].shape == weight.shape


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_meta_device(shape: tuple[int, ...]) -> None:
    weight, alpha, g = make(shape, device="meta", dtype=torch.bfloat16)
    kernel = standardize(weight, alpha)
    assert (kernel.device.type, kernel.shape, kernel.dtype) == ("meta", weight.shape, torch.bfloat16)
    assert [t.shape for t in grad(kernel, [weight, alpha], g)] == [weight.shape, alpha.shape]


def test_no_step_can_shift_a_filter() -> None:
    """Behind positive inputs the plain gradient shares a sign in each filter; through `standardize` its mean is 0."""
    weight, alpha, _ = make((8, 6, 3, 3))
    images = torch.rand(4, 6, 8, 8)

    def shift(kernel: Tensor) -> Tensor:
        """`|mean| / mean |.|` of the gradient of each filter."""
        (g,) = grad((F.conv2d(images, kernel) + 1).square().sum(), weight)
        return (g.mean((1, 2, 3)) / g.abs().mean((1, 2, 3))).abs()

    assert shift(weight).min() > 0.9
    assert shift(standardize(weight, alpha)).max() < TOLERANCES["float32"].rtol


@PROPERTY
@given(
    seed=st.integers(0, 2**32),
    a=st.floats(0.01, 100),
    b=st.floats(-10, 10),
    gamma=st.one_of(st.just(0.0), st.floats(1e-12, 1e-2)),
)
def test_invariance_to_scale_and_shift_as_gamma_vanishes(seed: int, a: float, b: float, gamma: float) -> None:
    """The kernel shrinks by `sqrt(v / (v + gamma)) >= 1 - gamma / (2 v)`, so that is how far the two may differ."""
    weight = torch.randn(3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    kernels = [standardize(w, gamma=gamma) for w in (weight, a * weight + b)]
    v = weight.var(1, keepdim=True, correction=0)
    limit = standardize(weight, gamma=0.0).abs() * gamma / 2 * torch.maximum(1 / v, 1 / (a * a * v))
    # The mean costs |b| / (a sd) digits of the 1e-16.
    rounding = 1e-14 * (1 + abs(b) / (a * v.sqrt()))
    assert ((kernels[0] - kernels[1]).abs() <= limit + rounding).all()


@PROPERTY
@given(seed=st.integers(0, 2**32), b=st.floats(-10, 10), gamma=st.floats(0, 1))
def test_invariance_to_shift_for_every_gamma(seed: int, b: float, gamma: float) -> None:
    weight = torch.randn(3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert_close(standardize(weight + b, gamma=gamma), standardize(weight, gamma=gamma), "float64")


def test_a_mean_of_a_thousand_deviations() -> None:
    weight = (torch.randn(4, 576) + 1000).requires_grad_()
    alpha, g = torch.ones(4), torch.randn(4, 576)
    n = weight.shape[1] ** 0.5
    kernel = standardize(weight, alpha, gain=n)  # entries of deviation 1, so that the tolerance is in deviations
    assert_close(kernel, reference.kernel(weight, alpha, gain=n), "large mean")
    assert_close(grad(kernel, weight, g)[0], reference.gradients(weight, alpha, g, gain=n)[0], "large mean")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [0.0, 0.1, -3.0])
def test_constant_filters_stay_finite(value: float, dtype: torch.dtype) -> None:
    """A dead filter has kernel 0, and a gradient bounded by gamma that can revive it."""
    weight = torch.full((3, 4, 3, 3), value, dtype=dtype, requires_grad=True)
    alpha = torch.ones(3, dtype=dtype, requires_grad=True)
    g = torch.randn(3, 4, 3, 3).to(dtype)
    kernel = standardize(weight, alpha, gamma=1e-3)
    grad_weight, grad_alpha = grad(kernel, [weight, alpha], g)
    row = str(dtype).removeprefix("torch.")
    assert_close(kernel, torch.zeros(3, 4, 3, 3), "float32")
    assert_close(grad_alpha, torch.zeros(3), "float32")
    centred = g.double() - g.double().mean((1, 2, 3), keepdim=True)
    assert_close(grad_weight, reference.RELU_GAIN / 6 / 1e-3**0.5 * centred, "float32" if row == "float64" else row)


@pytest.mark.parametrize("in_dims", [(0, 0), (2, None), (1, 1)], ids=str)
def test_vmap_over_weights(in_dims: tuple[int, int | None]) -> None:
    weights, alphas = torch.randn(5, 4, 3, 2, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    moved = alphas[0] if in_dims[1] is None else alphas.movedim(0, in_dims[1])

    def loss(weight: Tensor, alpha: Tensor) -> Tensor:
        return standardize(weight, alpha).exp().sum()

    arguments = (weights.movedim(0, in_dims[0]), moved)
    kernels = torch.func.vmap(standardize, in_dims)(*arguments)
    grads = torch.func.vmap(torch.func.grad(loss, (0, 1)), in_dims)(*arguments)
    for i, weight in enumerate(weights):
        alpha = alphas[0] if in_dims[1] is None else alphas[i]
        expected = reference.kernel(weight, alpha)
        assert_close(kernels[i], expected, "float64")
        published = reference.gradients(weight, alpha, expected.exp())
        for mine, formula in zip(grads, published, strict=True):
            assert_close(mine[i], formula, "float64")


def test_vmap_without_alpha() -> None:
    weights = torch.randn(5, 4, 3, dtype=torch.float64)
    expected = torch.stack([reference.kernel(weight) for weight in weights])
    assert_close(torch.func.vmap(standardize)(weights), expected, "float64")


@pytest.mark.parametrize("with_alpha", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_forward_mode_gives_the_references_derivative(layout: torch.memory_format, with_alpha: bool) -> None:
    leaves = [t.detach() for t in make((4, 3, 2, 3), dtype=torch.float64)[: 2 if with_alpha else 1]]
    leaves[0] = leaves[0].to(memory_format=layout)
    tangents = [torch.randn_like(leaf) for leaf in leaves]
    kernel, tangent = torch.func.jvp(standardize, tuple(leaves), tuple(tangents))
    expected = torch.func.jvp(reference.kernel, tuple(leaves), tuple(tangents))
    assert_close(kernel, expected[0], "float64")
    assert_close(tangent, expected[1], "float64")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward_mode_in_smaller_dtypes(dtype: torch.dtype) -> None:
    leaves = tuple(t.detach().to(dtype) for t in make((4, 9))[:2])
    tangents = tuple(torch.randn_like(leaf) for leaf in leaves)
    tangent = torch.func.jvp(standardize, leaves, tangents)[1]
    wide = [tuple(t.double() for t in tensors) for tensors in (leaves, tangents)]
    assert tangent.dtype == dtype
    assert_close(tangent, torch.func.jvp(reference.kernel, *wide)[1], str(dtype).removeprefix("torch."))


def test_forward_mode_over_a_batch_of_weights_and_over_backward() -> None:
    weights, tangents = torch.randn(2, 5, 4, 3, dtype=torch.float64)

    def derivatives(form: Callable[[Tensor], Tensor], weight: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
        def loss(w: Tensor) -> Tensor:
            return form(w).exp().sum()

        along = torch.func.jvp(form, (weight,), (tangent,))[1]
        return along, torch.func.jvp(torch.func.grad(loss), (weight,), (tangent,))[1]

    ours = torch.func.vmap(partial(derivatives, standardize))(weights, tangents)
    for i in range(5):
        expected = derivatives(reference.kernel, weights[i], tangents[i])
        for mine, theirs in zip(ours, expected, strict=True):
            assert_close(mine[i], theirs, "float64")


def compiled_equals_eager(gain: float | str, backend: str) -> None:
    torch.compiler.reset()
    weight, alpha, g = make((4, 3, 3, 3))
    kernel = torch.compile(pws.standardize, fullgraph=True, backend=backend)(weight, alpha, gain=gain)
    assert_close(kernel, reference.kernel(weight, alpha), "float32")
    for mine, formula in zip(grad(kernel, [weight, alpha], g), reference.gradients(weight, alpha, g), strict=True):
        assert_close(mine, formula, "float32")


def test_compile_with_a_number_as_gain() -> None:
    compiled_equals_eager(reference.RELU_GAIN, "inductor")


def test_compile_with_the_default_gain() -> None:
    """Tracing alone: a gain given by name, as the default is, must not break the graph."""
    compiled_equals_eager("relu", "aot_eager")


@pytest.mark.parametrize("with_alpha", [True, False])
def test_compile_in_autocast_and_channels_last(with_alpha: bool) -> None:
    torch.compiler.reset()
    weight, some_alpha, g = make((4, 8, 3, 3))
    weight = weight.detach().to(memory_format=torch.channels_last).requires_grad_()
    alpha = some_alpha if with_alpha else None
    with torch.autocast("cpu", torch.bfloat16):
        kernel = torch.compile(standardize, fullgraph=True, backend="aot_eager")(weight, alpha)
    assert kernel.dtype == torch.bfloat16
    assert_close(kernel, reference.kernel(weight, alpha), "bfloat16")
    (grad_weight,) = grad(kernel, weight, g.bfloat16())
    assert_close(grad_weight, reference.gradients(weight, alpha, g.bfloat16())[0], "float32")


class Standardize(torch.nn.Module):
    def forward(self, weight: Tensor, alpha: Tensor) -> Tensor:
        return standardize(weight, alpha)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_holds_no_batch_norm(strict: bool) -> None:
    """It would ask whoever reads the program what training mode is."""
    weight, alpha, _ = (t.detach() for t in make((4, 8, 3, 3)))
    exported = torch.export.export(Standardize(), (weight, alpha), strict=strict)
    assert "batch_norm" not in str(exported.graph)
    assert_close(exported.module()(weight, alpha), reference.kernel(weight, alpha), "float32")


@pytest.mark.parametrize("shape", [(4, 1), (4, 1, 1, 1), (4,), (), (4, 0)], ids=str)
def test_fan_in_below_two_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(pws.ShapeError, match=r"fan-in of at least 2") as caught:
        standardize(torch.ones(shape))
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize("shape", [(1,), (5,), (4, 1, 1), ()], ids=str)
def test_alpha_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(pws.ShapeError, match=r"shape \(4,\)") as caught:
        standardize(torch.ones(4, 3, 2), torch.ones(shape))
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize("gamma", [-1e-3, float("nan"), float("inf")])
def test_gamma_outside_its_range_is_refused(gamma: float) -> None:
    with pytest.raises(pws.PwsError, match="at least 0") as caught:
        standardize(torch.ones(4, 3), gamma=gamma)
    assert repr(gamma) in str(caught.value)


@pytest.mark.parametrize("gain", [0, -1.0, float("nan"), float("inf")])
def test_gain_outside_its_range_is_refused(gain: float) -> None:
    with pytest.raises(pws.PwsError, match="positive finite number or the name") as caught:
        standardize(torch.ones(4, 3), gain=gain)
    assert repr(gain) in str(caught.value)


def test_misspelt_gain_suggests_the_nearest() -> None:
    with pytest.raises(pws.PwsError, match="'leakyrelu'; did you mean leaky_relu"):
        standardize(torch.ones(4, 3), gain="leakyrelu")
