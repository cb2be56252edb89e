"""Drop-in layers: torch.nn's convolutions and Linear, whose kernel is the standardized weight.

Each class takes the arguments of its parent in torch.nn, then keyword-only `gamma`, `relative_gamma` and `gain`, and
behaves like the parent in everything else. Parameters: `weight` (the parent's shape, Kaiming normal for ReLU), `alpha`
`(out_channels,)` at 1 and `bias` (the paper's beta) at 0. There are no buffers and nothing is cached: the kernel is
computed from the parameters in every forward pass, so a copy, a cast or a loaded checkpoint can never leave a stale one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import init

from pws._gain import resolve_gain
from pws._standardize import check_fan_in, check_gamma, scaled, swap_channels

Size = int | tuple[int, ...]
Device = torch.device | str | int | None


class StandardizedLayer(nn.Module):
    """What all layers share: the parameters, the kernel and the checkpoint format.

    Raises:
        ShapeError: the fan-in is 1 (a depthwise 1x1 convolution, or 1x1 from one channel).
        PwsError: gamma is negative, gain is not positive or names no activation.
    """

    weight: Tensor
    bias: Tensor | None
    alpha: nn.Parameter

    def __init__(
        self,
        *args: Any,
        gamma: float = 1e-3,
        relative_gamma: bool = False,
        gain: float | str = "relu",
        **kwargs: Any,
    ) -> None:
        check_gamma(gamma)
        number = resolve_gain(gain)
        super().__init__(*args, **kwargs)
        self.gamma, self.relative_gamma, self.gain = gamma, relative_gamma, number
        self.alpha = nn.Parameter(
            torch.ones(self.filters().shape[0], device=self.weight.device, dtype=self.weight.dtype)
        )

    def filters(self) -> Tensor:
        """The weight with one filter per entry of the leading dimension, `(out_channels, ...)`."""
        return self.weight

    def kernel(self) -> Tensor:
        """The standardized weight, in the shape of `weight`: what the layer convolves with."""
        return scaled(self.filters(), self.alpha, self.gain, self.gamma, self.relative_gamma)

    def reset_parameters(self) -> None:
        """Kaiming normal weights for ReLU (deviation `sqrt(2 / fan_in)`), alpha 1, bias 0."""
        raw = self._parameters["weight"]
        assert raw is not None
        init.normal_(raw, std=(2 / check_fan_in(self.filters())) ** 0.5)
        if self.bias is not None:
            init.zeros_(self.bias)
        if "alpha" in self._parameters:  # the parent's constructor calls this before alpha exists
            init.ones_(self.alpha)

    def extra_repr(self) -> str:
        """The parent's settings, then ours."""
        relative = ", relative_gamma=True" if self.relative_gamma else ""
        return f"{super().extra_repr()}, gamma={self.gamma:g}{relative}, gain={self.gain:.5g}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        alpha = state_dict.get(f"{prefix}alpha")
        if alpha is not None and alpha.dim() > 1 and alpha.numel() == alpha.shape[0]:
            # The authors' checkpoints hold alpha as (out_channels, 1, 1, 1).
            state_dict[f"{prefix}alpha"] = alpha.flatten()
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Conv(StandardizedLayer):
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: str | Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        gamma: float = 1e-3,
        relative_gamma: bool = False,
        gain: float | str = "relu",
    ) -> None:
        super().__init__(
            *(
                in_channels,
                out_channels,
                kernel_size,
                stride,
                padding,
                dilation,
                groups,
                bias,
                padding_mode,
                device,
                dtype,
            ),
            gamma=gamma,
            relative_gamma=relative_gamma,
            gain=gain,
        )

    def forward(self, input: Tensor) -> Tensor:
        """Convolve `input` with the kernel, add the bias."""
        return self._conv_forward(input, self.kernel(), self.bias)


class Conv1d(_Conv, nn.Conv1d):
    """`torch.nn.Conv1d` with a standardized kernel."""


class Conv2d(_Conv, nn.Conv2d):
    """`torch.nn.Conv2d` with a standardized kernel.

    Examples:
        >>> layer = Conv2d(3, 8, 3, padding=1)
        >>> layer(torch.randn(2, 3, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """


class Conv3d(_Conv, nn.Conv3d):
    """`torch.nn.Conv3d` with a standardized kernel."""


class _ConvTranspose(StandardizedLayer):
    """A filter is what makes one output channel: `(in_channels / groups, *kernel_size)`, here spread over `weight[:, j]`.

    With a stride each output position meets only `fan_in / prod(stride)` entries of its filter, so the variance is that
    much smaller than behind an ordinary convolution; `pws.calibrate` evens it out.
    """

    groups: int
    output_padding: tuple[int, ...]
    _output_padding: Callable[..., list[int]]
    _convolve: ClassVar[Callable[..., Tensor]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: str = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        gamma: float = 1e-3,
        relative_gamma: bool = False,
        gain: float | str = "relu",
    ) -> None:
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, output_padding),
            *(groups, bias, dilation, padding_mode, device, dtype),
            gamma=gamma,
            relative_gamma=relative_gamma,
            gain=gain,
        )

    def filters(self) -> Tensor:
        """The weight with one filter an entry of the leading dimension, `(out_channels, in_channels / groups, ...)`."""
        return swap_channels(self.weight, self.groups)

    def kernel(self) -> Tensor:
        """The standardized weight, in the shape of `weight`: what the layer convolves with."""
        return swap_channels(super().kernel(), self.groups)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Transpose-convolve `input` with the kernel, add the bias."""
        settings: Any = self
        output_padding = self._output_padding(
            *(input, output_size, settings.stride, settings.padding, settings.kernel_size),
            *(self.weight.dim() - 2, settings.dilation),
        )
        return type(self)._convolve(
            *(input, self.kernel(), self.bias, settings.stride, settings.padding),
            *(output_padding, self.groups, settings.dilation),
        )


class ConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` with a standardized kernel."""

    _convolve = staticmethod(F.conv_transpose1d)


class ConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` with a standardized kernel."""

    _convolve = staticmethod(F.conv_transpose2d)


class ConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` with a standardized kernel."""

    _convolve = staticmethod(F.conv_transpose3d)


class Linear(StandardizedLayer, nn.Linear):  # type: ignore[misc]  # nn.Linear says that its bias is never None
    """`torch.nn.Linear` with a standardized kernel."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        gamma: float = 1e-3,
        relative_gamma: bool = False,
        gain: float | str = "relu",
    ) -> None:
        super().__init__(
            *(in_features, out_features, bias, device, dtype), gamma=gamma, relative_gamma=relative_gamma, gain=gain
        )

    def forward(self, input: Tensor) -> Tensor:
        """`input @ kernel.T + bias`."""
        return F.linear(input, self.kernel(), self.bias)
