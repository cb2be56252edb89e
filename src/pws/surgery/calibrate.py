"""Data-dependent scales and biases: the paper's `initalpha` as an explicit call, for any model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn

from pws.autocast import fresh_casts
from pws.errors import PwsError
from pws.layers import StandardizedLayer
from pws.mark import filters_of
from pws.surgery.branches import branch_ends
from pws.surgery.standardized import is_standardized, own_filters, own_weight, set_filters
from pws.surgery.trace import input_of

Batch = Tensor | tuple[Any, ...] | list[Any]


@dataclass(frozen=True)
class Calibrated:
    """One layer that `calibrate` set."""

    layer: str
    variance: float
    """Output variance found, behind layers already calibrated; with `per_channel`, the mean of the channels'."""
    factor: float
    """What the kernel was multiplied with; with `per_channel`, the mean of the channels' factors."""


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Tensor | Iterable[Batch],
    *,
    target: float = 1.0,
    per_channel: bool = False,
    mean: float | None = None,
    share_branches: bool = False,
    only: Callable[[str, nn.Module], bool] | None = None,
) -> list[Calibrated]:
    """Scale the kernels, layer by layer in execution order, so that each layer's output has variance `target`; on request
    shift the bias too, and keep residual streams in bounds.

        kernel <- kernel * sqrt(target / Var(y - bias)),      Var biased, over all entries of the output

    A marked layer's weight is its kernel; a pws layer's kernel is scaled by its alpha. Call this before the optimizer is
    made: an optimizer of `pws.optim` starts from the kernels that it finds.

    One forward pass over all batches joined: each layer sees inputs that come from layers already calibrated. A layer
    called more than once is set by its first call. The result is stored in the parameters alone, so a checkpoint carries it
    and a resumed run must not call this again. With `torch.distributed` initialized, the statistics are pooled over all
    ranks, and every rank (all must hold the same model) sets the same scales.

    The model runs in eval mode without gradient (BatchNorm then uses its running statistics); its modes, buffers and
    every other parameter are left as they were.

    Args:
        model: any module that holds marked layers or pws layers.
        batches: the model's input tensor, or an iterable of batches, each such a tensor or a tuple that starts with it
            (put one `(images, labels)` of a loader into a list). They are joined: choose no more samples than one forward
            pass has memory for.
        target: the output variance wanted; the paper uses 2.
        per_channel: a factor a channel, from that channel's own variance, instead of one a layer.
        mean: shift each bias so that its channel's output has this mean (BatchNorm's is 0), and take the variance about the
            channels' means; layers without a bias, and all biases if left out, stay.
        share_branches: the last layers of the residual branches, which are found by following one run of the model, get
            `target / B` for `B` additions: together they add as much variance to the stream as it started with.
        only: calibrate the layers for which `only(name, layer)` is true; all that are marked and all pws layers if left out.

    Returns:
        What was found and done, in execution order.

    Raises:
        PwsError: no such layer ran, or an output's variance is zero or not finite; all parameters are then as they were.

    Source: paper section 4, `initalpha`: target 2, on the stem and the first convolution of each residual block.
    """
    if not 0 < target < float("inf"):
        raise PwsError(f"calibrate needs a positive finite target variance; got {target!r}. Usual: 1; the paper: 2.")
    names = {m: n for n, m in model.named_modules() if is_standardized(m) and (not only or only(n, m))}
    setting = Setting(names, target, per_channel, mean)
    if names:
        images = _join(batches).to(_scale_of(next(iter(names))).device)
        setting.shares = branch_ends(model, images) if share_branches else {}
        setting.run(model, lambda: model(images))
    if not setting.done:
        raise PwsError(
            f"calibrate found no marked layer and no pws layer that ran in {type(model).__name__}. Mark its layers (pws.mark, "
            "pws.convert), build it with pws.Conv2d and its kin, or check the `only` argument."
        )
    return list(setting.done.values())


@dataclass
class Setting:
    """Layers being set, each when it is called."""

    names: Mapping[nn.Module, str]
    target: float
    per_channel: bool
    mean: float | None
    shares: Mapping[str, float] = field(default_factory=dict)
    """Of the target, for the layers that end residual branches."""
    done: dict[Tensor, Calibrated] = field(default_factory=dict)
    """By what was scaled: a weight of two layers is set by the first."""

    @fresh_casts()
    def run(self, model: nn.Module, forward: Callable[[], object]) -> None:
        """Set all layers that `forward` calls; none if it fails."""
        layers = list(self.names)
        with torch.no_grad(), _restored_on_error(layers), evaluated(model), hooked(layers, self._set):
            forward()

    def _set(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        scale, bias = _scale_of(layer), _bias_of(layer)
        if scale in self.done:
            return output
        name, channel = self.names[layer], 1 - _kernel_of(layer).dim()
        channel_last = output.movedim(channel, -1)
        centred = channel_last if bias is None else channel_last - bias
        shift = None if self.mean is None or bias is None else -_moments(centred, True)[0]
        if shift is not None:
            centred = centred + shift.to(centred.dtype)
        variance = _moments(centred, self.per_channel)[1]
        _check_variance(variance, _rounding(layer, input_of(args, kwargs)), name)
        factor = (self.target * self.shares.get(name, 1.0) / variance).sqrt()
        self.done[scale] = Calibrated(name, float(variance.mean()), float(factor.mean()))
        _multiply(layer, factor)
        result = centred * factor.to(centred.dtype)
        if bias is not None:
            if self.mean is not None and shift is not None:
                bias.copy_(self.mean + shift * factor)
                result = result + self.mean
            else:
                result = result + bias
        return result.movedim(-1, channel)


def _scale_of(layer: nn.Module) -> Tensor:
    """The parameter that holds the kernel's scale."""
    return layer.alpha if isinstance(layer, StandardizedLayer) else own_weight(layer)


def _kernel_of(layer: nn.Module) -> Tensor:
    return layer.kernel() if isinstance(layer, StandardizedLayer) else own_weight(layer)


def _bias_of(layer: nn.Module) -> Tensor | None:
    bias: Any = layer.bias
    return bias  # type: ignore[no-any-return]


def _multiply(layer: nn.Module, factor: Tensor) -> None:
    """Multiply the kernel, by one factor or one a filter."""
    if isinstance(layer, StandardizedLayer):
        layer.alpha.mul_(factor)
    else:
        filters = own_filters(layer)
        set_filters(layer, filters * factor.view(-1, *[1] * (filters.dim() - 1)))
    # A forward that is decorated with autocast has its cache on, and would go on with the copy of the weight before.
    torch.clear_autocast_cache()


def _moments(output: Tensor, per_channel: bool) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all entries, or over all but the last dimension; pooled over the ranks, in float64."""
    rows = output.double().reshape(-1, output.shape[-1] if per_channel else 1)
    moments = torch.stack([torch.full_like(rows[0], rows.shape[0]), rows.sum(0), rows.square().sum(0)])
    if distributed.is_available() and distributed.is_initialized():
        # Gathered and added in the order of the ranks, so that every rank gets the same bits.
        gathered = [torch.empty_like(moments) for _ in range(distributed.get_world_size())]
        distributed.all_gather(gathered, moments)
        moments = torch.stack(gathered).sum(0)
    count, total, squares = moments
    mean: Tensor = total / count
    return mean, squares / count - mean.square()


def _rounding(layer: nn.Module, inputs: Tensor) -> float:
    """An output variance that rounding alone can make: a zero-mean kernel answers a constant input with such noise."""
    kernel = filters_of(layer, _kernel_of(layer))
    scale = kernel.double().square().sum() / len(kernel) * inputs.double().square().mean()
    return float(scale) * (16 * torch.finfo(inputs.dtype).eps) ** 2


def _check_variance(variance: Tensor, rounding: float, name: str) -> None:
    if not (torch.isfinite(variance).all() and (variance > rounding).all()):
        raise PwsError(
            f"calibrate needs an output that varies; layer {name!r} has variance {variance.min():g} (smallest channel). "
            "A constant or non-finite input, dead activations in front of it, or a kernel of zeros do this: check the batch "
            "and the layers before this one."
        )


def _join(batches: Tensor | Iterable[Batch]) -> Tensor:
    parts = (
        [batches]
        if isinstance(batches, Tensor)
        else [b[0] if isinstance(b, tuple | list) and b else b for b in batches]
    )
    shapes = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
    samples = [part for part in parts if isinstance(part, Tensor) and part.numel()]
    if not parts or len(samples) < len(parts) or len({part.shape[1:] for part in samples}) > 1:
        raise PwsError(
            "calibrate needs at least one batch, of input tensors that can be joined, or of tuples that start with one; "
            f"got {shapes or 'none'}. Put a single (images, labels) batch into a list."
        )
    return torch.cat(samples)


@contextmanager
def _restored_on_error(layers: list[nn.Module]) -> Iterator[None]:
    parameters = [p for layer in layers for p in (_scale_of(layer), _bias_of(layer)) if p is not None]
    before = [parameter.clone() for parameter in parameters]
    try:
        yield
    except BaseException:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
        raise


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, then each module as it was."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def hooked(layers: Sequence[nn.Module], hook: Callable[..., Tensor | None]) -> Iterator[None]:
    """The layers with a forward hook `(layer, args, kwargs, output)`."""
    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
