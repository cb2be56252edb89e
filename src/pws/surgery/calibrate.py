"""Data-dependent alpha and bias: the paper's `initalpha` as an explicit call, for any model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn

from pws.errors import PwsError
from pws.layers import StandardizedLayer
from pws.surgery.branches import branch_ends
from pws.surgery.trace import input_of

Batch = Tensor | tuple[Any, ...] | list[Any]


@dataclass(frozen=True)
class Calibrated:
    """One layer that `calibrate` set."""

    layer: str
    variance: float
    """Output variance found, behind layers already calibrated; with `per_channel`, the mean of the channels'."""
    factor: float
    """What alpha was multiplied with; with `per_channel`, the mean of the channels' factors."""


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
    """Scale alpha, layer by layer in execution order, so that each layer's output has variance `target`; on request shift the
    bias too, and keep residual streams in bounds.

        alpha <- alpha * sqrt(target / Var(y - bias)),      Var biased, over all entries of the output

    One forward pass over all batches joined: each layer sees inputs that come from layers already calibrated. A layer
    called more than once is set by its first call. The result is stored in alpha and bias alone, so a checkpoint carries it
    and a resumed run must not call this again. With `torch.distributed` initialized, the statistics are pooled over all
    ranks, and every rank (all must hold the same model) sets the same alpha.

    The model runs in eval mode without gradient (BatchNorm then uses its running statistics); its modes, buffers and
    every other parameter are left as they were.

    Args:
        model: any module that holds pws layers.
        batches: the model's input tensor, or an iterable of batches, each such a tensor or a tuple that starts with it
            (put one `(images, labels)` of a loader into a list). They are joined: choose no more samples than one forward
            pass has memory for.
        target: the output variance wanted; the paper uses 2.
        per_channel: a factor a channel, from that channel's own variance, instead of one a layer.
        mean: shift each bias so that its channel's output has this mean (BatchNorm's is 0), and take the variance about the
            channels' means; layers without a bias, and all biases if left out, stay.
        share_branches: the last layers of the residual branches, which are found by following one run of the model, get
            `target / B` for `B` additions: together they add as much variance to the stream as it started with.
        only: calibrate the layers for which `only(name, layer)` is true; all pws layers if left out.

    Returns:
        What was found and done, in execution order.

    Raises:
        PwsError: no pws layer ran, or an output's variance is zero or not finite; alpha and bias are then as they were.

    Source: paper section 4, `initalpha`: target 2, on the stem and the first convolution of each residual block.
    """
    if not 0 < target < float("inf"):
        raise PwsError(f"calibrate needs a positive finite target variance; got {target!r}. Usual: 1; the paper: 2.")
    names = {m: n for n, m in model.named_modules() if isinstance(m, StandardizedLayer) and (not only or only(n, m))}
    setting = Setting(names, target, per_channel, mean)
    if names:
        images = _join(batches).to(next(iter(names)).weight.device)
        setting.shares = branch_ends(model, images) if share_branches else {}
        setting.run(model, lambda: model(images))
    if not setting.done:
        raise PwsError(
            f"calibrate found no pws layer that ran in {type(model).__name__}. Build the model with "
            "pws.Conv2d and its kin, or check the `only` argument."
        )
    return list(setting.done.values())


@dataclass
class Setting:
    """Layers being set, each when it is called."""

    names: Mapping[StandardizedLayer, str]
    target: float
    per_channel: bool
    mean: float | None
    shares: Mapping[str, float] = field(default_factory=dict)
    """Of the target, for the layers that end residual branches."""
    done: dict[nn.Module, Calibrated] = field(default_factory=dict)

    def run(self, model: nn.Module, forward: Callable[[], object]) -> None:
        """Set all layers that `forward` calls; none if it fails."""
        layers = list(self.names)
        with torch.no_grad(), _restored_on_error(layers), evaluated(model), hooked(layers, self._set):
            forward()

    def _set(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        assert isinstance(layer, StandardizedLayer)
        if layer in self.done:
            return output
        name = self.names[layer]
        channel_last = output.movedim(1 - layer.weight.dim(), -1)
        centred = channel_last if layer.bias is None else channel_last - layer.bias
        shift = None if self.mean is None or layer.bias is None else -_moments(centred, True)[0]
        if shift is not None:
            centred = centred + shift.to(centred.dtype)
        variance = _moments(centred, self.per_channel)[1]
        _check_variance(variance, _rounding(layer, input_of(args, kwargs)), name)
        factor = (self.target * self.shares.get(name, 1.0) / variance).sqrt()
        self.done[layer] = Calibrated(name, float(variance.mean()), float(factor.mean()))
        layer.alpha.mul_(factor)
        result = centred * factor.to(centred.dtype)
        if layer.bias is not None:
            if self.mean is not None and shift is not None:
                layer.bias.copy_(self.mean + shift * factor)
                result = result + self.mean
            else:
                result = result + layer.bias
        return result.movedim(-1, 1 - layer.weight.dim())


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


def _rounding(layer: StandardizedLayer, inputs: Tensor) -> float:
    """An output variance that rounding alone can make: a zero-mean kernel answers a constant input with such noise."""
    scale = layer.kernel().double().square().sum() / layer.alpha.numel() * inputs.double().square().mean()
    return float(scale) * (16 * torch.finfo(inputs.dtype).eps) ** 2


def _check_variance(variance: Tensor, rounding: float, name: str) -> None:
    if not (torch.isfinite(variance).all() and (variance > rounding).all()):
        raise PwsError(
            f"calibrate needs an output that varies; layer {name!r} has variance {variance.min():g} (smallest channel). "
            "A constant or non-finite input, dead activations in front of it, or alpha = 0 do this: check the batch and "
            "the layers before this one."
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
def _restored_on_error(layers: list[StandardizedLayer]) -> Iterator[None]:
    parameters = [p for layer in layers for p in (layer.alpha, layer.bias) if p is not None]
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
