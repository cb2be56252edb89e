"""The norms that Opacus rejects, or should."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm


def is_refused_norm(module: nn.Module) -> bool:
    """Whether it mixes the samples of a batch, or keeps statistics of them: every BatchNorm that is not constant, and
    InstanceNorm with running statistics. (Opacus itself looks at exact classes, and not at norms without parameters.)"""
    if isinstance(module, _InstanceNorm):
        return module.track_running_stats
    return isinstance(module, _BatchNorm)


def has_free_statistics(module: nn.Module) -> bool:
    """Whether it is a BatchNorm that takes those of each batch, in eval mode too."""
    return isinstance(module, _BatchNorm) and module.running_mean is None
