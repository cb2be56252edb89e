"""torchvision's detectors by family and backbone, for images of any size, with BatchNorm behind their hidden convolutions.

A method then takes the place of BatchNorm (`pws.methods.apply_method`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import detection as tvd
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOS, FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.ssd import SSD

from pws._errors import PwsError, UnknownNameError
from pws.methods.outputs import groups_of
from pws.models.detector_backbones import BACKBONES, fpn_backbone
from pws.models.detector_spec import LONGEST, DetectorSpec
from pws.models.ssd import build_ssd, build_ssdlite

HIDDEN: Final = (
    *("backbone.fpn.", "rpn.head.conv.", "roi_heads.box_head.", "roi_heads.mask_head.", "roi_heads.keypoint_head."),
    *("head.classification_head.conv.", "head.regression_head.conv."),
)
"""Where torchvision's detectors hold the hidden layers of their pyramid and heads."""
RATIOS: Final = (0.5, 1.0, 2.0)


def _rcnn(backbone: str, spec: DetectorSpec, kind: type[tvd.FasterRCNN], **heads: Any) -> nn.Module:
    levels = fpn_backbone(backbone, spec.channels, dense=False)
    sizes = tuple((spec.anchor_size * 2**level,) for level in range(levels.levels))
    features = max(8, round(1024 * spec.width))
    norm = nn.BatchNorm2d
    box_head = (
        TwoMLPHead(spec.channels * 49, features)
        if spec.head == "mlp"
        else FastRCNNConvFCHead((spec.channels, 7, 7), [spec.channels] * 4, [features], norm_layer=norm)
    )
    model: nn.Module = kind(
        levels.backbone,
        rpn_anchor_generator=AnchorGenerator(sizes, (RATIOS,) * len(sizes)),
        box_head=box_head,
        box_predictor=FastRCNNPredictor(features, spec.num_classes + 1),
        **spec.sizes,
        **heads,
        **spec.options,
    )
    return model


def _faster(backbone: str, spec: DetectorSpec) -> nn.Module:
    return _rcnn(backbone, spec, tvd.FasterRCNN)


def _mask(backbone: str, spec: DetectorSpec) -> nn.Module:
    channels = spec.channels
    return _rcnn(
        *(backbone, spec, tvd.MaskRCNN),
        mask_head=MaskRCNNHeads(channels, [channels] * 4, 1, norm_layer=nn.BatchNorm2d),
        mask_predictor=MaskRCNNPredictor(channels, channels, spec.num_classes + 1),
    )


def _keypoint(backbone: str, spec: DetectorSpec) -> nn.Module:
    if spec.keypoints < 1:
        raise PwsError(
            "Keypoint R-CNN needs data with keypoints, and these have none. Use coco-keypoints or digit-scenes, or Mask R-CNN."
        )
    width = max(8, round(512 * spec.width))
    # MaskRCNNHeads is the same stack of convolutions, and takes a norm.
    return _rcnn(
        *(backbone, spec, tvd.KeypointRCNN),
        keypoint_head=MaskRCNNHeads(spec.channels, [width] * 8, 1, norm_layer=nn.BatchNorm2d),
        keypoint_predictor=KeypointRCNNPredictor(width, spec.keypoints),
    )


def _retinanet(backbone: str, spec: DetectorSpec) -> nn.Module:
    levels = fpn_backbone(backbone, spec.channels, dense=True)
    sizes = tuple(
        tuple(round(spec.anchor_size * 2 ** (level + third / 3)) for third in range(3))
        for level in range(levels.levels)
    )
    anchors = AnchorGenerator(sizes, (RATIOS,) * len(sizes))
    # The levels share the head's convolutions, and have statistics of their own: BatchNorm would mix them.
    head = RetinaNetHead(
        *(spec.channels, anchors.num_anchors_per_location()[0], spec.num_classes + 1),
        norm_layer=partial(nn.GroupNorm, groups_of(spec.channels)),
    )
    model: nn.Module = tvd.RetinaNet(
        levels.backbone, spec.num_classes + 1, anchor_generator=anchors, head=head, **spec.sizes, **spec.options
    )
    return model


class NarrowFCOSHead(FCOSHead):  # type: ignore[misc]
    """torchvision's head of FCOS for any number of channels, where its own needs a multiple of 32."""

    def __init__(self, channels: int, labels: int) -> None:
        nn.Module.__init__(self)
        norm = partial(nn.GroupNorm, groups_of(channels))
        self.box_coder = BoxLinearCoder(normalize_by_size=True)
        self.classification_head = FCOSClassificationHead(channels, 1, labels, norm_layer=norm)
        self.regression_head = FCOSRegressionHead(channels, 1, norm_layer=norm)


def _fcos(backbone: str, spec: DetectorSpec) -> nn.Module:
    levels = fpn_backbone(backbone, spec.channels, dense=True)
    # An anchor is as large as the stride of its map.
    sizes = tuple((spec.anchor_size // 4 * 2**level,) for level in range(levels.levels))
    anchors = AnchorGenerator(sizes, ((1.0,),) * len(sizes))
    head = NarrowFCOSHead(spec.channels, spec.num_classes + 1)
    model: nn.Module = FCOS(
        levels.backbone, spec.num_classes + 1, anchor_generator=anchors, head=head, **spec.sizes, **spec.options
    )
    return model


@dataclass(frozen=True)
class Family:
    """Detectors that differ in their backbone."""

    build: Callable[[str, DetectorSpec], nn.Module]
    kind: type[nn.Module]
    """torchvision's class, whose numbers are the options."""
    backbones: tuple[str, ...] = BACKBONES


FAMILIES: Final[dict[str, Family]] = {
    "faster-rcnn": Family(_faster, tvd.FasterRCNN),
    "mask-rcnn": Family(_mask, tvd.MaskRCNN),
    "keypoint-rcnn": Family(_keypoint, tvd.KeypointRCNN),
    "retinanet": Family(_retinanet, tvd.RetinaNet),
    "fcos": Family(_fcos, FCOS),
    "ssd": Family(build_ssd, SSD, ("vgg16",)),
    "ssdlite": Family(build_ssdlite, SSD, ("mobilenetv3",)),
}
DETECTORS: Final = tuple(f"{name}-{backbone}" for name, family in FAMILIES.items() for backbone in family.backbones)


def build_detector(name: str, spec: DetectorSpec) -> nn.Module:
    """The detector of `DETECTORS` called `name`, random weights.

    In training it takes a list of images and one of targets, and returns a dict of losses; in eval mode it takes the images and
    returns a dict of boxes, labels, scores (masks, keypoints) each. Labels count from 1.

    Raises:
        UnknownNameError: no such detector, or no such option.
        PwsError: images too small for it, or data without keypoints for a Keypoint R-CNN.
    """
    if name not in DETECTORS:
        raise UnknownNameError("detector", name, DETECTORS)
    family_name, _, backbone = name.rpartition("-")
    family = FAMILIES[family_name]
    known = options_of(family.kind)
    for option in spec.options:
        if option not in known:
            raise UnknownNameError(f"option of {name} (torchvision's {family.kind.__name__})", option, known)
    return family.build(backbone, spec)


def options_of(kind: type[nn.Module]) -> list[str]:
    """The numbers that a recipe may set of one of torchvision's classes."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    numbers = [p.name for p in parameters if isinstance(p.default, int | float)]
    return [name for name in numbers if name not in ("min_size", "max_size")]


def resize_to(model: nn.Module, image_size: int) -> None:
    """Make a detector of torchvision resize images to this shorter side, in place; SSD keeps its own size."""
    transform: Any = getattr(model, "transform", None)
    if transform is not None and transform.fixed_size is None:
        transform.min_size, transform.max_size = (image_size,), round(image_size * LONGEST)


def hidden_layers(model: nn.Module) -> list[str]:
    """Layers of a detector's pyramid and heads that do not predict, whether a norm stands beside them or not.

    PWS standardizes them: `pws.convert(model, example, norms=("batch", "group"), standardize=hidden_layers(model))`. A backbone
    without norms (torchvision's SSD300) counts too.
    """
    backbone = model.get_submodule("backbone")
    bare = not any(isinstance(module, _BatchNorm | nn.GroupNorm) for module in backbone.modules())
    places = (*HIDDEN, *(["backbone."] if bare else []))
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return [name for name in layers if name.startswith(places)]
