"""Methods that leave outputs alone: plain networks, and those that normalize weights or gradients."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import Optimizer

from pws._errors import PwsError
from pws._gain import PAPER_GAIN, variance_preserving_gain
from pws._layers import Conv2d, Linear, StandardizedLayer
from pws._mark import mark
from pws.methods.method import Method, kaiming, plain_conv
from pws.methods.outputs import one_group
from pws.methods.timm_layers import timm_layer
from pws.optim.bound import STEP_BOUND
from pws.surgery._plan import Form

OURS: Final = "Parametric Weights Standardization: Liu et al. 2021, with this library's defaults"


def none() -> Method:
    """No normalization."""
    return Method("none", "plain convolutions: He et al. 2015 (initialization)", plain_conv)


def skipinit() -> Method:
    """Plain convolutions; each residual branch ends with a scalar that starts at 0. Without branches it is `none`."""
    source = "SkipInit: De and Smith 2020"
    return Method("skipinit", source, plain_conv, end_branch=lambda conv, _: nn.Sequential(conv, Scale()))


class Scale(nn.Module):
    """A trainable scalar that starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:
        """The scaled input."""
        return self.scale * input


def wn() -> Method:
    """Weight Normalization."""

    def conv(in_channels: int, out_channels: int, kernel_size: int, **settings: Any) -> nn.Module:
        return _weight_norm(plain_conv(in_channels, out_channels, kernel_size, **settings))

    def head(in_features: int, num_classes: int) -> nn.Module:
        return _weight_norm(nn.Linear(in_features, num_classes))

    return Method("wn", "Weight Normalization: Salimans and Kingma 2016", conv, head)


def _weight_norm(layer: nn.Module) -> nn.Module:
    normalized: nn.Module = weight_norm(layer)
    return normalized


def centred() -> Method:
    """Weights less their mean over each filter, and nothing else of PWS."""

    def conv(in_channels: int, out_channels: int, kernel_size: int, **settings: Any) -> nn.Module:
        return _centre(plain_conv(in_channels, out_channels, kernel_size, **settings))

    def head(in_features: int, num_classes: int) -> nn.Module:
        return _centre(nn.Linear(in_features, num_classes))

    return Method("centred", "Centered Weight Normalization's centring alone: Huang et al. 2017", conv, head)


class Centred(nn.Module):
    """`w_o - mean(w_o)`, a parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        """The centred weight."""
        return centre_filters(weight)


def centre_filters(weight: Tensor) -> Tensor:
    """Each filter (an entry of the leading dimension) less its mean."""
    return weight - weight.mean(tuple(range(1, weight.dim())), keepdim=True)


def _centre(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Centred())


def gc() -> Method:
    """Gradient Centralization."""

    def rule(model: nn.Module, _: Optimizer) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None and parameter.dim() > 1:
                parameter.grad.copy_(centre_filters(parameter.grad))

    return Method("gc", "Gradient Centralization: Yong et al. 2020", plain_conv, gradients=rule)


def nf(*, clip_factor: float = 0.01) -> Method:
    """Scaled Weight Standardization with Adaptive Gradient Clipping, and SkipInit in residual networks.

    Clipping is for the standardized convolutions and the scales of branches: layers that predict are plain.

    Args:
        clip_factor: the norm that AGC allows a unit's gradient, in units of its weights'. NFNets: 0.01 at batch 4096, larger
            for smaller batches.
    """
    std_conv = timm_layer("nf", "std_conv", "ScaledStdConv2d")
    try:
        from timm.utils.agc import adaptive_clip_grad
    except ImportError as error:
        raise PwsError("the method nf uses timm's adaptive_clip_grad: pip install 'pws-torch[models]'.") from error

    def conv(in_channels: int, out_channels: int, kernel_size: int, **settings: Any) -> nn.Module:
        gain = variance_preserving_gain("relu")
        return kaiming(std_conv(in_channels, out_channels, kernel_size, gamma=gain, **settings))

    clipped = (std_conv, timm_layer("nf", "std_conv", "ScaledStdConv2dSame"), Scale)

    def rule(model: nn.Module, _: Optimizer) -> None:
        body = [module for module in model.modules() if isinstance(module, clipped)]
        adaptive_clip_grad(
            [parameter for module in body for parameter in module.parameters(recurse=False)], clip_factor
        )

    return Method(
        *("nf", "Normalizer-free: scaled weight standardization and AGC, Brock et al. 2021", conv),
        end_branch=lambda conv, _: nn.Sequential(conv, Scale()),
        gradients=rule,
    )


def pws_paper(*, gamma: float = 1e-3) -> Method:
    """PWS as published: gain sqrt(2), a plain head, nothing done to the gradients."""

    def conv(in_channels: int, out_channels: int, kernel_size: int, **settings: Any) -> nn.Module:
        return _marked(nn.Conv2d, in_channels, out_channels, kernel_size, **settings, gain=PAPER_GAIN, gamma=gamma)

    source = "Parametric Weights Standardization as published: Liu et al. 2021"
    return Method("pws-paper", source, conv, end_norm=one_group)


def pws_default(
    *,
    gain: float | str = "relu",
    gamma: float = 1e-3,
    relative_gamma: bool = False,
    standardize_head: bool = True,
    form: Form = "optimizer",
) -> Method:
    """PWS as this library has it: all layers' defaults, the head standardized too, the step bounded, no norm anywhere.

    In a residual network the last kernel of each of `B` branches starts times `1 / sqrt(B)`. In the form "layers" the network
    consists of pws layers, which standardize in each forward pass; any optimizer trains them.
    """
    ours: dict[str, Any] = {"gain": gain, "gamma": gamma, "relative_gamma": relative_gamma}
    if form == "layers":
        return _of_layers(ours, standardize_head=standardize_head)

    def conv(in_channels: int, out_channels: int, kernel_size: int, **settings: Any) -> nn.Module:
        return _marked(nn.Conv2d, in_channels, out_channels, kernel_size, **settings, **ours)

    def head(in_features: int, num_classes: int) -> nn.Module:
        return (
            _marked(nn.Linear, in_features, num_classes, **ours)
            if standardize_head
            else nn.Linear(in_features, num_classes)
        )

    return Method("pws", OURS, conv, head, end_branch=_share_variance, step_bound=STEP_BOUND)


def _of_layers(ours: dict[str, Any], *, standardize_head: bool) -> Method:
    """The same with pws layers."""
    return Method(
        *("pws", OURS, partial(Conv2d, **ours), partial(Linear, **ours) if standardize_head else nn.Linear),
        end_branch=_share_alpha,
        step_bound=STEP_BOUND,
    )


def _marked(
    kind: type[nn.Module], *sizes: int, gain: float | str, gamma: float, relative_gamma: bool = False, **settings: Any
) -> nn.Module:
    """A marked layer, drawn once: torch's own initialization would draw from the generator before."""
    layer: nn.Module = nn.utils.skip_init(kind, *sizes, **settings)
    return mark(layer, gain=gain, gamma=gamma, relative_gamma=relative_gamma, reset_parameters=True)


def _share_alpha(conv: nn.Module, blocks: int) -> nn.Module:
    """`_share_variance` of a pws layer."""
    assert isinstance(conv, StandardizedLayer)
    with torch.no_grad():
        conv.alpha.mul_(blocks**-0.5)
    return conv


def _share_variance(conv: nn.Module, blocks: int) -> nn.Module:
    """The kernel times `1 / sqrt(blocks)`: the branches together add as much variance to the stream as the stem gave it."""
    assert isinstance(conv, nn.Conv2d)
    with torch.no_grad():
        conv.weight.mul_(blocks**-0.5)
    return conv
