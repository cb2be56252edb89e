"""Pre-activation ResNets for every method: the paper's CIFAR and ImageNet networks.

Every block starts with the activation (behind the method's norm, where it has one: He et al. 2016, "Identity Mappings")
and nothing follows the addition. Methods without a norm in the blocks keep the variance of the residual stream in one of
three ways: by what ends each branch (`Method.end_branch`), by a one-group norm behind the stem and one in front of the
head (`Method.end_norm`, the paper's), or by a division of the stream by sqrt(2) at each addition (the paper's too).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from pws.methods import Method
from pws.methods.method import Norm


@dataclass(frozen=True)
class Design:
    """What tells one ResNet from another."""

    blocks: tuple[int, ...]
    """Blocks of each stage."""
    widths: tuple[int, ...]
    """Channels of each stage, before the bottleneck's expansion by 4."""
    strides: tuple[int, ...]
    """Stride of each stage's first block."""
    bottleneck: bool
    imagenet_stem: bool
    """A 7x7 convolution with stride 2 and a max-pool; else a 3x3 convolution."""
    end_norms: bool = True
    """Whether methods with an `end_norm` use it; else they do as methods without any norm."""
    stem: int = 64
    """Channels of the stem."""


class Block(nn.Module):
    """`x + branch(x)`, times `scale`; the branch is (norm,) activation, convolution, twice or (bottleneck) three times.

    `blocks` is the number of blocks of the network.
    """

    def __init__(
        self,
        method: Method,
        in_channels: int,
        channels: int,
        stride: int,
        *,
        bottleneck: bool,
        scale: float,
        blocks: int,
    ) -> None:
        super().__init__()
        out_channels = channels * 4 if bottleneck else channels
        plain = method.norm is None
        widths = [in_channels, channels, channels, out_channels] if bottleneck else [in_channels, channels, channels]
        kernels, strides = ((1, 3, 1), (1, stride, 1)) if bottleneck else ((3, 3), (stride, 1))
        self.norms = nn.ModuleList(_norm(method.norm, width) for width in widths[:-1])
        self.convs = nn.ModuleList(
            method.conv(widths[i], widths[i + 1], kernels[i], stride=strides[i], padding=kernels[i] // 2, bias=plain)
            for i in range(len(kernels))
        )
        if method.end_branch is not None:
            self.convs[-1] = method.end_branch(self.convs[-1], blocks)
        self.activations = nn.ModuleList(method.activation() for _ in kernels)
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = method.conv(in_channels, out_channels, 1, stride=stride, bias=plain) if changes else None
        self.scale = scale

    def forward(self, stream: Tensor) -> Tensor:
        """The stream behind this block."""
        branch = self.activations[0](self.norms[0](stream))
        if self.shortcut is not None:
            stream = self.shortcut(branch)
        branch = self.convs[0](branch)
        for norm, activation, conv in zip(self.norms[1:], self.activations[1:], self.convs[1:], strict=True):
            branch = conv(activation(norm(branch)))
        total: Tensor = stream + branch
        return total * self.scale


class ResNet(nn.Module):
    """Stem, stages of blocks, norm, activation, global average pool, head."""

    def __init__(
        self, design: Design, method: Method, in_channels: int = 3, num_classes: int = 10, width: float = 1.0
    ) -> None:
        super().__init__()
        end_norm = method.end_norm if design.end_norms and method.norm is None else None
        scale = 2**-0.5 if method.norm is None and end_norm is None and method.end_branch is None else 1.0
        channels = _scaled(design.stem, width)
        kernel, stride = (7, 2) if design.imagenet_stem else (3, 1)
        bias = method.norm is None
        self.stem = method.conv(in_channels, channels, kernel, stride=stride, padding=kernel // 2, bias=bias)
        self.stem_norm = _norm(end_norm, channels)
        self.pool = nn.MaxPool2d(3, 2, 1) if design.imagenet_stem else nn.Identity()
        blocks: list[Block] = []
        for count, stage, first_stride in zip(design.blocks, design.widths, design.strides, strict=True):
            for i in range(count):
                stage_stride = first_stride if i == 0 else 1
                block = Block(
                    *(method, channels, _scaled(stage, width), stage_stride),
                    bottleneck=design.bottleneck,
                    scale=scale,
                    blocks=sum(design.blocks),
                )
                blocks.append(block)
                channels = _scaled(stage, width) * (4 if design.bottleneck else 1)
        self.blocks = nn.Sequential(*blocks)
        self.head_norm = _norm(method.norm or end_norm, channels)
        self.activation = method.activation()
        self.head = method.head(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, num_classes)` of images `(N, in_channels, H, W)`."""
        stream = self.blocks(self.pool(self.stem_norm(self.stem(images))))
        features = self.activation(self.head_norm(stream)).mean((2, 3))
        logits: Tensor = self.head(features)
        return logits

    def initalpha_layers(self) -> set[nn.Module]:
        """The layers that the paper's `initalpha` calibrates: the stem and the first convolution of each block."""
        first = [block.convs[0] for block in self.blocks if isinstance(block, Block)]
        return {self.stem, *first}


def _norm(norm: Norm | None, channels: int) -> nn.Module:
    return nn.Identity() if norm is None else norm(channels)


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))
