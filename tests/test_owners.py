"""The weight's gradient is written over the kernel's only where nobody else holds that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import pws
from pws.kernels import cpu, registry


def _held_by_a_hook(kernel: Tensor, held: list[Tensor]) -> None:
    kernel.register_hook(held.append)


def _held_as_a_view(kernel: Tensor, held: list[Tensor]) -> None:
    kernel.register_hook(lambda grad: held.append(grad.detach().view_as(grad)))


def _retained(kernel: Tensor, held: list[Tensor]) -> None:
    kernel.retain_grad()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("hold", [None, _held_by_a_hook, _held_as_a_view, _retained])
def test_a_gradient_is_overwritten_only_if_nobody_holds_it(
    hold: Callable[[Tensor, list[Tensor]], None] | None, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Tensor] = []

    def overwriting(*arguments: Any) -> tuple[Tensor, Tensor]:
        calls.append(arguments[0])
        return cpu.overwriting(*arguments)

    monkeypatch.setitem(registry._loaded, "cpu", replace(cpu.CPU, overwriting=overwriting))
    weight = torch.randn(8, 3, 3, 3).to(memory_format=layout).requires_grad_()
    factor, held = torch.randn(8, 3, 3, 3).to(memory_format=layout), []
    kernel = pws.standardize(weight)
    if hold is not None:
        hold(kernel, held)
    (kernel * factor).sum().backward()
    assert len(calls) == (
        hold in (None, _retained)
    )  # that nobody holds it is recognized too; what is retained is a copy
    for gradient in [*held, kernel.grad] if hold is _retained else held:
        assert gradient is not None
        assert torch.equal(gradient.flatten(), factor.flatten())
    wide = weight.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad((pws.standardize(wide) * factor.double()).sum(), wide)
    torch.testing.assert_close(weight.grad, expected.float(), rtol=1e-4, atol=1e-5)


def test_gradients_that_others_get_too_are_not_overwritten() -> None:
    weight, factor = torch.randn(8, 3, 3, 3, requires_grad=True), torch.randn(8, 3, 3, 3)
    kernel = pws.standardize(weight)
    grad_kernel, grad_weight = torch.autograd.grad((kernel * factor).sum(), [kernel, weight])
    assert torch.equal(grad_kernel, factor)
    given = factor.clone()
    (again,) = torch.autograd.grad(pws.standardize(weight), weight, given)
    assert torch.equal(given, factor)
    torch.testing.assert_close(again, grad_weight)
    # One gradient for two: what the sum hands to both of its terms.
    other = weight.detach().clone().requires_grad_()
    (((pws.standardize(weight) + pws.standardize(other)) * factor).sum()).backward()
    torch.testing.assert_close(weight.grad, grad_weight)
    torch.testing.assert_close(other.grad, grad_weight)
