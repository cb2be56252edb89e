"""The CIFAR all-convolutional network of paper section 4: nine convolutions and a head."""

from __future__ import annotations

from torch import Tensor, nn

from pws.methods import Method


class AllConv(nn.Module):
    """3 x conv 96, max-pool, 3 x conv 192, max-pool, conv 192 3x3 valid, 2 x conv 192 1x1, average pool, head.

    Each convolution is followed by the method's norm, if it has one, and its activation. The head is the paper's 1x1
    convolution to the classes, written as the linear layer that it is behind a global average pool.
    Images need at least 12 pixels per side.
    """

    def __init__(self, method: Method, in_channels: int = 3, num_classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        narrow, wide = (max(1, round(channels * width)) for channels in (96, 192))
        self.features = nn.Sequential(
            *_stage(method, in_channels, narrow, kernel_sizes=(3, 3, 3)),
            nn.MaxPool2d(2),
            *_stage(method, narrow, wide, kernel_sizes=(3, 3, 3)),
            nn.MaxPool2d(2),
            *_stage(method, wide, wide, kernel_sizes=(3, 1, 1), padding=0),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = method.head(wide, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, num_classes)` of images `(N, in_channels, H, W)`."""
        logits: Tensor = self.head(self.features(images))
        return logits


def _stage(
    method: Method, in_channels: int, channels: int, kernel_sizes: tuple[int, ...], padding: int | None = None
) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for kernel_size in kernel_sizes:
        pad = kernel_size // 2 if padding is None else padding
        layers.append(method.conv(in_channels, channels, kernel_size, padding=pad, bias=method.norm is None))
        if method.norm is not None:
            layers.append(method.norm(channels))
        layers.append(method.activation())
        in_channels = channels
    return layers
