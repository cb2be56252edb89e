"""A plain stack of equal convolutions, as deep as wanted: what depth alone does."""

from __future__ import annotations

from torch import Tensor, nn

from pws.methods import Method


class Stack(nn.Module):
    """`depth` 3x3 convolutions of 64 channels, average pool, head.

    Each convolution is followed by the method's norm, if it has one, and its activation. The convolutions a third and two
    thirds of the way down have stride 2.
    """

    def __init__(
        self, depth: int, method: Method, in_channels: int = 3, num_classes: int = 10, width: float = 1.0
    ) -> None:
        super().__init__()
        channels = max(1, round(64 * width))
        layers: list[nn.Module] = []
        for number in range(depth):
            stride = 2 if number in (depth // 3, 2 * depth // 3) else 1
            layers.append(
                method.conv(in_channels, channels, 3, stride=stride, padding=1, bias=method.norm is None),
            )
            layers.extend([] if method.norm is None else [method.norm(channels)])
            layers.append(method.activation())
            in_channels = channels
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = method.head(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, num_classes)` of images `(N, in_channels, H, W)`."""
        logits: Tensor = self.head(self.features(images))
        return logits
