"""The numbers of one layer, computed from what a pass recorded of it.

Shape letters: O filters (output channels), K entries of a filter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pws.diagnosis.average_gradient import average_gradient_ratio
from pws.diagnosis.layer import Filters, LayerDiagnosis, Signal
from pws.diagnosis.recording.layer_record import LayerRecord
from pws.diagnosis.recording.moments import Moments, pool, pool_covariance, sum_of_squares


def layer_diagnosis(
    record: LayerRecord, step: Tensor | None, product_before: float = 1.0, loss_scale: float = 1.0
) -> LayerDiagnosis:
    """Compute the numbers of a layer.

    Args:
        record: what the layer did.
        step: the gradient step of its kernel as `(O, K)`; None if there is none.
        product_before: the product of the transmissions of the layers before it.
        loss_scale: what the loss was multiplied with before the backward pass.
    """
    calls = record.calls
    inputs, outputs = pool([c.input for c in calls]), pool([c.output for c in calls])
    centred, shift = pool([c.centred for c in calls]), pool([c.shift for c in calls])
    patch = pool([c.patch for c in calls])
    covariance = pool_covariance([c.centred for c in calls], [c.shift for c in calls], [c.covariance for c in calls])
    transmission = _ratio(_mean(outputs.variance), _mean(inputs.variance))
    back = _backward(record, loss_scale)
    moved = _Step() if step is None else _step(record, step, patch, _mean(outputs.variance))
    return LayerDiagnosis(
        name=record.name,
        kind=record.kind,
        operation=record.operation,
        kernel_shape=record.kernel_shape,
        fan_in=record.fan_in,
        groups=record.layout.groups,
        calls=len(calls),
        positions=outputs.count,
        finite=record.finite,
        finite_kernel=math.isfinite(record.kernel_norm),
        note=_note(record, step, back.gradient, _mean(outputs.variance)),
        input=_signal(inputs),
        output=_signal(outputs),
        dead_inputs=_mean(torch.stack([c.dead for c in calls]).all(0).double()),
        transmission=transmission,
        transmission_product=product_before * transmission,
        centred=_mean(centred.variance),
        shift=_mean(shift.variance),
        covariance=2 * _mean(covariance),
        gradient=back.gradient,
        gradient_transmission=back.transmission,
        average_gradient=_rms(back.average),
        expectation_part=_rms(back.expectation),
        covariance_part=_rms(back.covariance),
        average_gradient_ratio=moved.average_ratio,
        normalized=_is_normalized(record),
        gate=record.gate,
        predicts=record.predicts,
        update_ratio=moved.update_ratio,
        critical_lr=moved.critical_lr,
        filters=Filters(
            mean=record.filter_mean,
            centred=centred.variance,
            patch_variance=patch.variance,
            average_gradient=back.average,
            expectation_part=back.expectation,
            covariance_part=back.covariance,
            average_step=moved.average,
        ),
    )


@dataclass(frozen=True)
class _Backward:
    gradient: Signal | None = None
    transmission: float | None = None
    average: Tensor | None = None
    expectation: Tensor | None = None
    covariance: Tensor | None = None


def _backward(record: LayerRecord, scale: float) -> _Backward:
    seen = [(call, call.backward) for call in record.calls if call.backward is not None]
    gradients = [call.kernel_gradient for call in record.calls if call.kernel_gradient is not None]
    average = torch.stack(gradients).sum(0) / scale if gradients else None
    if not seen:  # the kernel may have a gradient still: by a gradient that the loss is made of
        return _Backward(average=average)
    delta = pool([b.delta for _, b in seen])
    gradient = Moments(delta.count, delta.mean / scale, delta.variance / scale**2)
    expectation = gradient.count * gradient.mean * pool([call.patch for call, _ in seen]).mean
    delta_patch = torch.stack([b.delta_patch for _, b in seen]).sum(0) / scale
    return _Backward(
        gradient=_signal(gradient),
        transmission=_gradient_transmission(record, delta),
        average=average,
        expectation=None if average is None else expectation,
        covariance=None if average is None else delta_patch - expectation,
    )


@dataclass(frozen=True)
class _Step:
    average: Tensor | None = None
    average_ratio: float | None = None
    update_ratio: float | None = None
    critical_lr: float | None = None


def _step(record: LayerRecord, step_OK: Tensor, patch: Moments, variance: float) -> _Step:
    average = _average(step_OK, record.dtype)
    return _Step(
        average=average,
        average_ratio=_mean(average_gradient_ratio(step_OK).masked_fill(average == 0, 0.0)),
        update_ratio=_ratio(sum_of_squares([step_OK]) ** 0.5, record.kernel_norm),
        critical_lr=None if variance == 0 else _critical_lr(average, record.fan_in, patch.variance, variance),
    )


def _is_normalized(record: LayerRecord) -> bool:
    """Whether each call's gradient is orthogonal to the kernel (Euler's theorem for a loss that ignores the kernel's scale).

    Of independent gradients a part of about 1 / sqrt(n) goes along the kernel. Behind BatchNorm and InstanceNorm, whose eps
    leaves a small part, the gradient of each channel also has mean 0 to rounding; behind other norms it need not.
    """
    tight = min(1e-3, 0.02 * record.fan_in**-0.5)
    seen = [(c.radial, c.backward.delta) for c in record.calls if c.radial is not None and c.backward is not None]
    return bool(seen) and all(
        compared > 0 and abs(along) < compared * (0.05 if _has_zero_mean(delta) else tight)
        for (along, compared), delta in seen
    )


def _has_zero_mean(delta: Moments) -> bool:
    return delta.count > 1 and bool((delta.mean.abs() <= 1e-4 * delta.second_moment.sqrt()).all())


def _gradient_transmission(record: LayerRecord, delta: Moments) -> float | None:
    squares = [call.input_gradient_squares for call in record.calls if call.input_gradient_squares is not None]
    if not squares:
        return None
    entries = sum(call.input.count * call.input.mean.numel() for call in record.calls)
    return _ratio(sum(squares) / entries, _mean(delta.second_moment))


def _average(step: Tensor, dtype: torch.dtype) -> Tensor:
    """The mean of each filter's step; 0 where it is no more than what rounding leaves of a step that has none."""
    average = step.double().mean(1)
    # Over 800 random standardized filters at most 7 units in the last place of the step.
    rounding = 16 * torch.finfo(dtype).eps * step.double().square().mean(1).sqrt()
    return average.masked_fill(average.abs() <= rounding, 0.0)


def _critical_lr(average_step: Tensor, fan_in: int, patch_variance: Tensor, variance: float) -> float:
    per_unit = _mean((fan_in * average_step).square() * patch_variance)
    if not (math.isfinite(per_unit) and math.isfinite(variance)):
        return math.nan
    return math.sqrt(variance / per_unit) if per_unit > 0 else math.inf


def _note(record: LayerRecord, step: Tensor | None, gradient: Signal | None, variance: float) -> str:
    if gradient is None:
        return "no gradient reached its output"
    if step is None and not record.trained:
        return "its kernel is not trained"
    if step is None:
        return "how a step moves its kernel can't be told" if record.step_map is None else "its kernel got no gradient"
    return "its output is constant" if variance == 0 else ""


def _signal(moments: Moments) -> Signal:
    return Signal(
        mean=_mean(moments.mean),
        variance=_mean(moments.variance),
        second_moment=_mean(moments.second_moment),
        total_variance=float(moments.total_variance()),
    )


def _mean(values: Tensor) -> float:
    return float(values.mean())


def _rms(values: Tensor | None) -> float | None:
    return None if values is None else float(values.square().mean().sqrt())


def _ratio(over: float, under: float) -> float:
    if under == 0:
        return 0.0 if over == 0 else math.inf
    return over / under
