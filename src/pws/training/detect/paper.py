"""The authors' detectors: which layers of each are standardized, with which constants, and where a norm stays.

Source: the detectors of the authors of Liu et al. 2021, trained by their own settings. One thing differs: each filter of SSD's
predictors has an alpha of its own, where theirs share one.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

import torch
from torch import nn

from pws._gain import PAPER_GAIN
from pws._mark import unmark
from pws.methods import apply_method
from pws.methods.outputs import group_norm, one_group
from pws.surgery import calibrate, plan
from pws.surgery.copying import copy_of
from pws.surgery.standardized import own_filters, standardize_layer

FIRST: Final = ("*.conv1", "*.downsample.0")
"""The stem, the first convolution of each block and the shortcuts, in torchvision's ResNets."""
TARGET: Final = 2.0
"""Output variance that `initalpha` sets."""


@dataclass(frozen=True)
class Part:
    """Layers with the same constants."""

    pattern: str
    gamma: float
    relative_gamma: bool = False
    gain: float = PAPER_GAIN
    fan_out: bool = False
    """The kernel is divided by the root of the fan-out, not of the fan-in."""
    scaled: tuple[str, ...] = ()
    """Those of them whose alpha is set from data."""


@dataclass(frozen=True)
class Published:
    """A detector of the authors'."""

    parts: tuple[Part, ...]
    norms: tuple[tuple[str, Any], ...] = ()
    """Which norms stay, as what."""


_STEM: Final = ("backbone.body.bn1", one_group)
PUBLISHED: Final = {
    "mask-rcnn": Published(
        (
            Part("backbone.body.*", 1e-4, scaled=FIRST),
            Part("backbone.fpn.*", 0.1, relative_gamma=True, scaled=("*",)),
            Part("roi_heads.box_head.[0-3].0", 0.1, relative_gamma=True, scaled=("*",)),
            Part("roi_heads.mask_head.*", 0.1, relative_gamma=True, scaled=("*",)),
        ),
        (_STEM,),
    ),
    "faster-rcnn": Published(
        (Part("backbone.body.*", 1e-5, fan_out=True, scaled=FIRST),),
        (_STEM, ("backbone.fpn.*", group_norm), ("roi_heads.box_head.*", group_norm)),
    ),
    "ssd": Published((Part("backbone.*", 1e-3), Part("head.*", 1e-3, gain=1.0))),
}
"""By family; the others have no detector of the authors'."""


def as_published(model: nn.Module, family: str, example: Any) -> nn.Module:
    """A copy of a detector with BatchNorm as the authors have it; a family without one gets `pws-paper` as any model does."""
    if family not in PUBLISHED:
        return apply_method(model, "pws-paper", example)
    published = PUBLISHED[family]
    model = copy_of(model)
    for name, norm in _norms_that_stay(model, published):
        old: Any = model.get_submodule(name)
        model.set_submodule(name, norm(old.num_features))
    patterns = [part.pattern for part in published.parts if _matches(model, part.pattern)]
    steps = plan(model, example, standardize=patterns, keep=[] if family == "ssd" else ["rpn.*"])
    result: nn.Module = steps.apply(calibrate=False)
    unmark(result)
    scaled = set()
    for name in steps.named("standardize"):
        part = next(part for part in published.parts if fnmatchcase(name, part.pattern))
        _standardize(result.get_submodule(name), part)
        if any(fnmatchcase(f".{name}", pattern) for pattern in part.scaled):
            scaled.add(name)
    if scaled:
        calibrate(result, [example], target=TARGET, only=lambda name, _: name in scaled)
    return result


def _matches(model: nn.Module, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name, _ in model.named_modules())


def _norms_that_stay(model: nn.Module, published: Published) -> list[tuple[str, Any]]:
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    return [(name, norm) for name in norms for pattern, norm in published.norms if fnmatchcase(name, pattern)]


@torch.no_grad()
def _standardize(layer: nn.Module, part: Part) -> None:
    """Draw the weights, and standardize them with the part's constants."""
    weight: Any = layer.weight
    nn.init.kaiming_normal_(weight, nonlinearity="relu")
    filters = own_filters(layer)
    fan_in, fan_out = filters[0].numel(), len(filters) * filters[0, 0].numel()
    gain = part.gain * (fan_in / fan_out) ** 0.5 if part.fan_out else part.gain
    standardize_layer(layer, gain=gain, gamma=part.gamma, relative_gamma=part.relative_gamma, bias=True)
