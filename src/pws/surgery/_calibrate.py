"""Data-dependent scales and biases: the paper's `initalpha` as an explicit call, for any model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn

from pws._autocast import fresh_casts
from pws._batch import REJECTIONS, Batch, Forward, batch_of, check_finite, on_device, takes_targets
from pws._errors import PwsError, one_line
from pws._layers import StandardizedLayer
from pws._mark import filters_of
from pws.optim.sharding import replicated, reshard, whole
from pws.surgery.branches import branch_ends
from pws.surgery.running import branches_run, evaluated, hooked, input_of, removed_after
from pws.surgery.stand_ins import Affine
from pws.surgery.standardized import is_standardized, own_filters, own_weight


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
    batches: Any,
    *,
    target: float = 1.0,
    per_channel: bool = False,
    mean: float | None = None,
    share_branches: bool = False,
    only: Callable[[str, nn.Module], bool] | None = None,
    forward: Forward | None = None,
) -> list[Calibrated]:
    """Scale the kernels, layer by layer in execution order, so that each layer's output has variance `target`.

    On request it shifts the biases too, and keeps residual streams in bounds.

        kernel <- kernel * sqrt(target / Var(y - bias)),      Var biased, over all entries of the output

    A marked layer's weight is its kernel; a pws layer's kernel is scaled by its alpha. Call this before the optimizer is
    made: an optimizer of `pws.optim` starts from the kernels that it finds.

    It runs one forward pass over all batches joined, so each layer sees inputs from layers that are already calibrated. The
    first call of a layer sets it. The result is stored in the parameters alone: a checkpoint carries it, and a resumed run
    must not call this again. With `torch.distributed` initialized, the statistics are pooled over all ranks. Every rank must
    hold the same model, and sets the same scales.

    The model runs in eval mode without gradient, where BatchNorm uses its running statistics. If some layers run in train mode
    alone (auxiliary heads) or got nothing to work on (a detector's mask head without boxes), it then runs in train mode, with
    the targets where the model takes them. If it does not take the batch there, or still gives those layers nothing, a warning
    says so, and they stay. Its modes, buffers and every other parameter are left as they were.

    Args:
        model: any module that holds marked layers or pws layers.
        batches: the model's input (a tensor, or a dict of arguments), or an iterable of batches as a DataLoader gives them:
            inputs, or `(inputs, targets)` (put one `(images, labels)` into a list). They are joined: choose no more samples
            than one forward pass has memory for. A model whose forward has an argument for targets gets those too.
        target: the output variance wanted; the paper uses 2.
        per_channel: one factor per channel, from that channel's own variance, instead of one per layer.
        mean: shift each bias so that its channel's output has this mean (BatchNorm's is 0), and take the variance about the
            channels' means. Layers without a bias stay, and so do all biases if this is left out.
        share_branches: give the last layers of the residual branches `target / B` for `B` additions. Together they then add
            as much variance to the stream as it started with. Following one run of the model finds the branches.
        forward: runs the model, `forward(model, batch)`, where a batch has another form; `batches` is one batch then.
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
        device = _scale_of(next(iter(names))).device
        batch = batch_of(batches, forward) if forward else on_device(_join(batches, model), device)
        setting.shares = branch_ends(model, batch, names.values()) if share_branches else {}
        try:
            setting.run(model, lambda: batch.outputs(model))
        except PwsError:
            raise
        except REJECTIONS as error:
            raise PwsError(
                f"calibrate needs batches that the model takes; {type(model).__name__} stopped with {type(error).__name__}: "
                f"{one_line(error)}. Give what its forward takes, as a DataLoader gives it."
            ) from error
    if not setting.done:
        raise PwsError(
            f"calibrate found no marked layer and no pws layer that ran in {type(model).__name__}. Mark its layers (pws.mark, "
            "pws.convert), build it with pws layers, or check the `only` argument."
        )
    return list(setting.done.values())


@dataclass
class Setting:
    """Layers being set, each by its first call; the parameters change at the end, so that a model may differentiate inside its
    forward, and nothing has changed if a layer fails."""

    names: Mapping[nn.Module, str]
    target: float
    per_channel: bool
    mean: float | None
    shares: Mapping[str, float] = field(default_factory=dict)
    """The share of the target, for the layers that end residual branches."""
    done: dict[Tensor, Calibrated] = field(default_factory=dict)
    """By what is scaled: a weight of two layers is set by the first."""
    factors: dict[Tensor, tuple[nn.Module, Tensor]] = field(default_factory=dict)
    """By the same; the layer, and one factor or one per channel."""
    biases: dict[nn.Module, Tensor] = field(default_factory=dict)
    """New ones."""
    affines: Mapping[nn.Module, float] = field(default_factory=dict)
    """What stands in for norms of the input, to the eps of the norm: set from what it is given."""
    set_affines: set[nn.Module] = field(default_factory=set)
    idle: set[nn.Module] = field(default_factory=set)
    """Layers that ran on nothing: no box reached a detector's head."""

    @fresh_casts()
    def run(self, model: nn.Module, forward: Callable[[], object]) -> None:
        """Set all layers that `forward` calls in eval mode, then those that it calls in train mode alone; none if it fails."""
        layers = list(self.names)
        pre_hooks = [affine.register_forward_pre_hook(self._set_affine) for affine in self.affines]
        with torch.no_grad(), hooked(layers, self._set), removed_after(pre_hooks):
            with evaluated(model):
                forward()
            if len(self.done) < len({_scale_of(layer) for layer in layers}):
                self._in_training(model, forward)
        self._warn_of_idle()
        reshard(model)
        self._write()

    def _in_training(self, model: nn.Module, forward: Callable[[], object]) -> None:
        try:
            with branches_run(model):
                forward()
        except PwsError:
            raise
        except REJECTIONS as error:
            # What ran in eval mode is set; the rest needs what only training gives, such as a detector's targets.
            warnings.warn(
                f"some layers did not run in eval mode, and in train mode {type(model).__name__} does not take the batch: "
                f"{one_line(error)}. They are left as they are.",
                stacklevel=2,
            )

    def _warn_of_idle(self) -> None:
        idle = [self.names[layer] for layer in self.names if layer in self.idle and _scale_of(layer) not in self.done]
        if idle:
            warnings.warn(
                f"{len(idle)} layers, such as {idle[0]!r}, were given nothing to work on, and keep the scale of their weights. "
                "In a detector no box reached them: calibrate on images with objects, together with their targets.",
                stacklevel=2,
            )

    def _set_affine(self, affine: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(affine, Affine)
        if affine not in self.set_affines:
            self.set_affines.add(affine)
            affine.standardize(args[0].detach(), self.affines[affine])

    def _set(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if not output.numel():
            self.idle.add(layer)
            return output
        scale, bias, channel = _scale_of(layer), _bias_of(layer), 1 - _kernel_of(layer).dim()
        channel_last = output.movedim(channel, -1)
        centred = channel_last if bias is None else channel_last - bias
        if scale not in self.done:
            inputs = input_of(args, kwargs)
            self._look(layer, centred.detach(), 0.0 if inputs is None else _rounding(layer, inputs))
        result = centred * self.factors[scale][1].to(centred.dtype)
        bias = self.biases.get(layer, bias)
        result = result if bias is None else result + bias.to(result.dtype)
        return result.movedim(-1, channel)

    def _look(self, layer: nn.Module, centred: Tensor, rounding: float) -> None:
        name, bias = self.names[layer], _bias_of(layer)
        shift = None if self.mean is None or bias is None else -_moments(centred, True)[0]
        if shift is not None:
            centred = centred + shift.to(centred.dtype)
        variance = _moments(centred, self.per_channel)[1]
        _check_variance(variance, rounding, name)
        factor = (self.target * self.shares.get(name, 1.0) / variance).sqrt()
        self.done[_scale_of(layer)] = Calibrated(name, float(variance.mean()), float(factor.mean()))
        self.factors[_scale_of(layer)] = layer, factor
        if shift is not None and self.mean is not None:
            self.biases[layer] = self.mean + shift * factor

    @torch.no_grad()
    def _write(self) -> None:
        for layer, factor in self.factors.values():
            scale = _scale_of(layer)
            scale.mul_(replicated(scale, _spread(layer, factor).to(scale.dtype)))
        for layer, bias in self.biases.items():
            old = layer._parameters["bias"]
            assert old is not None
            old.copy_(replicated(old, bias.to(old.dtype)))


def _spread(layer: nn.Module, factor: Tensor) -> Tensor:
    """One factor, or one per channel laid out as what is scaled."""
    if factor.numel() == 1 or isinstance(layer, StandardizedLayer):
        return factor
    filters = own_filters(layer)
    return filters_of(layer, factor.view(-1, *[1] * (filters.dim() - 1)).expand(filters.shape))


def _scale_of(layer: nn.Module) -> Tensor:
    """The parameter that holds the kernel's scale."""
    return layer.alpha if isinstance(layer, StandardizedLayer) else own_weight(layer)


def _kernel_of(layer: nn.Module) -> Tensor:
    return layer.kernel() if isinstance(layer, StandardizedLayer) else own_weight(layer)


def _bias_of(layer: nn.Module) -> Tensor | None:
    bias: Any = layer.bias
    return None if bias is None else whole(bias)


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
    kernel = whole(_kernel_of(layer)).detach()
    filters = len(filters_of(layer, kernel))
    scale = kernel.double().square().sum() / filters * inputs.detach().double().square().mean()
    return float(scale) * (16 * torch.finfo(inputs.dtype).eps) ** 2


def _check_variance(variance: Tensor, rounding: float, name: str) -> None:
    if not (torch.isfinite(variance).all() and (variance > rounding).all()):
        raise PwsError(
            f"calibrate needs an output that varies; layer {name!r} has variance {variance.min():g} (smallest channel). "
            "A constant or non-finite input, dead activations in front of it, or a kernel of zeros do this: check the batch "
            "and the layers before this one."
        )


def _join(batches: Any, model: nn.Module) -> Batch:
    """One batch of all inputs, whatever their structure; with the targets, if the model takes them."""
    parts = [batch_of(p) for p in ([batches] if isinstance(batches, Tensor | Mapping) else list(batches))]
    with_targets = takes_targets(model) and all(part.has_targets for part in parts)
    try:
        if not parts:
            raise TypeError("no batch at all")
        targets = _joined([part.targets for part in parts]) if with_targets else None
        joined = Batch(_joined([part.inputs for part in parts]), targets, with_targets)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PwsError(
            f"calibrate needs at least one batch, and batches that can be joined: {one_line(error)}. Give the model's input, "
            "or a list of batches as a DataLoader gives them; put a single (images, labels) batch into a list."
        ) from error
    check_finite(joined.inputs, "input")
    return joined


def _joined(parts: Sequence[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, Mapping):
        return {key: _joined([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple):
        return tuple(_joined(arguments) for arguments in zip(*parts, strict=True))
    if isinstance(first, list):
        return [item for part in parts for item in part]
    raise TypeError(f"inputs are tensors, or tuples, dicts or lists of them; got {type(first).__name__}")
