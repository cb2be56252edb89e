"""Conversion and calibration of detectors: heads that see boxes, pyramids, images without objects."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from small_detectors import small, two_objects
from torch import Tensor, nn
from torch.nn import functional as F

import pws
from pws._batch import example_of
from pws.models.detectors import DETECTORS
from pws.surgery.branches import branch_ends

NAMES = [name for name in DETECTORS if "resnet34" not in name and "resnet50" not in name]


def outputs_of(model: nn.Module, run: Any) -> dict[str, list[Tensor]]:
    """What each convolution and linear layer gave, call by call."""
    found: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_hook(
            lambda _, __, out, name=name: found.setdefault(name, []).append(out.detach().clone())
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
    ]
    run()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_norm_goes_and_what_predicts_stays_plain(name: str) -> None:
    model, example = small(name), two_objects()
    plan = pws.plan(model, example, norms=("batch", "group"))
    converted = plan.apply()
    assert not any(isinstance(m, nn.BatchNorm2d | nn.GroupNorm) for m in converted.modules())
    marked = set(pws.marked(converted))
    predictors = [
        n for n, m in converted.named_modules() if n.split(".")[-1] in ("cls_logits", "bbox_pred", "cls_score")
    ]
    assert not marked & set(predictors)
    losses = converted.train()(*example)
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses.keys() == model.train()(*example).keys()


@pytest.mark.parametrize("name", ["mask-rcnn-resnet18", "retinanet-resnet18"])
def test_residual_blocks_share_their_variance_and_pyramids_do_not(name: str) -> None:
    model, example = small(name), two_objects()
    blocks = {f"backbone.body.layer{stage}.{block}.conv2" for stage in (1, 2, 3, 4) for block in (0, 1)}
    layers = pws.plan(model, example, norms=("batch", "group")).named("standardize")
    assert branch_ends(model, example_of(model, example), layers) == dict.fromkeys(blocks, 1 / 8)


@pytest.mark.parametrize("name", ["mask-rcnn-resnet18", "ssd-vgg16"])
def test_calibrated_layers_give_variance_1_on_the_example(name: str) -> None:
    """In the mode in which each ran first: eval, or training for heads that nothing reached there."""
    model, example = small(name), two_objects()
    converted = pws.plan(model, example, norms=("batch", "group")).apply()
    ends = branch_ends(converted, example_of(converted, example), pws.marked(converted))
    found = outputs_of(converted, lambda: converted.eval()(example[0]))
    for layer in pws.marked(converted):
        first = next((out for out in found.get(layer, []) if out.numel()), None)
        if first is None or "mask_head" in layer:  # boxes differ between runs of other scales
            continue
        bias = converted.get_submodule(layer).bias
        centred = first if bias is None else first - bias.detach().view(-1, *[1] * (first.dim() - 2))  # type: ignore[operator]
        assert float(centred.double().var(correction=0)) == pytest.approx(ends.get(layer, 1.0), rel=1e-3), layer


class Head(nn.Module):
    """A body, and a head that eval mode gives nothing where no box was found; training gives it the true boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False)
        self.norm, self.head_norm = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, images: list[Tensor], targets: list[Tensor] | None = None) -> Any:
        maps = F.relu(self.norm(self.body(torch.stack(images))))
        chosen = maps[:0] if not self.training or targets is None else maps[torch.cat(targets)]
        return {"loss": self.head_norm(self.head(chosen)).sum()}


IMAGES = [torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def test_a_head_that_no_box_reached_is_calibrated_in_training() -> None:
    torch.manual_seed(0)
    targets = [torch.tensor([0]), torch.tensor([2, 3])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = pws.convert(Head(), (IMAGES, targets))
    found = outputs_of(converted, lambda: converted.train()(IMAGES, targets))
    assert float(found["head"][0].double().var(correction=0)) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("targets", [None, [torch.tensor([], dtype=torch.long)]], ids=["no targets", "no objects"])
def test_a_head_that_nothing_reaches_says_so_and_keeps_its_weights(targets: Any) -> None:
    torch.manual_seed(0)
    model = Head()
    example = IMAGES if targets is None else (IMAGES, targets)
    with pytest.warns(UserWarning, match="such as 'head', were given nothing to work on"):
        converted = pws.convert(model, example)
    kernel = pws.standardize(model.head.weight, gain=pws.marked(converted)["head"].gain, gamma=1e-3)
    torch.testing.assert_close(converted.head.weight, kernel)


def test_calibrate_gives_a_detector_its_targets() -> None:
    torch.manual_seed(0)
    converted = pws.plan(Head(), (IMAGES, [torch.tensor([0])])).apply(calibrate=False)
    done = pws.calibrate(converted, [(IMAGES[:2], [torch.tensor([0])]), (IMAGES[2:], [torch.tensor([3])])])
    assert [step.layer for step in done] == ["body", "head"]


def test_layers_without_a_norm_are_standardized_when_asked_for() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    images = torch.randn(4, 3, 12, 12)
    plan = pws.plan(model, images, standardize=["0", "2"], keep="2")
    assert plan.named("standardize") == ["0"]
    plan = pws.plan(model, images, standardize=lambda name, _: name != "4")
    converted = plan.apply()
    assert list(pws.marked(converted)) == ["0", "2"]
    found = outputs_of(converted, lambda: converted(images))
    for name in ("0", "2"):
        centred = found[name][0] - converted.get_submodule(name).bias.view(-1, 1, 1)  # type: ignore[operator]
        assert float(centred.double().var(correction=0)) == pytest.approx(1.0, rel=1e-4)
    torch.testing.assert_close(converted[4].weight, model[4].weight)


def test_a_model_without_norms_and_a_name_that_nothing_has() -> None:
    model, images = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 8, 8)
    with pytest.raises(pws.PwsError, match="Layers without a norm are chosen by standardize="):
        pws.plan(model, images)
    with pytest.raises(pws.PwsError, match="unknown layer or norm to standardize 'rpn"):
        pws.plan(model, images, standardize="rpn.*")
