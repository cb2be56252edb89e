"""Detectors: networks, backbones from a run, stages, batches, resume, and what a recipe may not say."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_data import write_folder
from small_detectors import FEW, small, two_objects
from torch import Tensor

import pws
from pws._errors import PwsError
from pws._files import partial_of
from pws.models.detector_spec import DetectorSpec
from pws.models.detectors import DETECTORS, build_detector, hidden_layers
from pws.training import DataConfig, Recipe, train
from pws.training._evaluate import load_trained
from pws.training.detect.backbone import freeze_stages
from pws.training.detect.data import DetectionData
from pws.training.detect.paper import as_published
from pws.training.model_and_data import load_run
from pws.training.recipe_file import recipe_of
from pws.training.samplers import TrainSampler
from pws.training.tasks import data_of, module_of

TINY = {
    "task": "detect",
    "model.name": "faster-rcnn-resnet18",
    "model.width": 0.03125,
    "model.anchor_size": 16,
    "model.options": FEW,
    "data.name": "digit-scenes",
    "data.image_size": 64,
    "data.batch_size": 2,
    "data.train_images": 4,
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
}


def tiny(**settings: Any) -> Recipe:
    return recipe_of({**TINY, **{key.replace("__", "."): value for key, value in settings.items()}})


def weights(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return state


@pytest.mark.parametrize("name", [n for n in DETECTORS if "resnet34" not in n and "resnet50" not in n])
@pytest.mark.parametrize("side", [64, 100])
def test_every_detector_takes_images_of_any_size(name: str, side: int) -> None:
    torch.manual_seed(0)
    options = FEW if "rcnn" in name else {}
    width = 1.0 if name.startswith("ssdlite") else 0.03125
    spec = DetectorSpec(5, side, width, anchor_size=16, keypoints=4, options=options)
    model, (images, targets) = build_detector(name, spec), two_objects()
    losses = model.train()(images, targets)
    assert all(bool(torch.isfinite(loss)) for loss in losses.values())
    found = model.eval()(images)
    assert [set(one) >= {"boxes", "labels", "scores"} for one in found] == [True, True]
    assert all(1 <= int(label) <= 5 for one in found for label in one["labels"])


def test_ssd_has_the_published_maps() -> None:
    """320 pixels: 40, 20, 10, 5, 3 and 1; 300 pixels: SSD300's 38, 19, 10, 5, 3, 1."""
    for side, wanted in ((320, [40, 20, 10, 5, 3, 1]), (300, [38, 19, 10, 5, 3, 1])):
        model = build_detector("ssd-vgg16", DetectorSpec(3, side, 0.03125)).eval()
        maps = model.backbone(torch.zeros(1, 3, side, side))  # type: ignore[operator]
        assert [tuple(m.shape[-2:]) for m in maps.values()] == [(s, s) for s in wanted]


def test_hidden_layers_are_all_but_what_predicts() -> None:
    model = small("mask-rcnn-resnet18")
    layers = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)}
    left = {name for name in layers - set(hidden_layers(model)) if not name.startswith("backbone.body.")}
    predictors = {"rpn.head.cls_logits", "rpn.head.bbox_pred", "roi_heads.mask_predictor.mask_fcn_logits"}
    assert left == predictors | {f"roi_heads.box_predictor.{name}" for name in ("cls_score", "bbox_pred")}


def test_pws_standardizes_backbone_pyramid_and_heads() -> None:
    recipe = tiny(model__method="pws")
    model = module_of(recipe, data_of(recipe)).model
    marked = set(pws.marked(model))
    assert set(hidden_layers(model)) <= marked
    assert {name for name in marked if name.startswith("backbone.body.")} >= {"backbone.body.layer4.1.conv2"}
    assert not any("predictor" in name or name.endswith(("cls_logits", "bbox_pred")) for name in marked)


def test_the_published_mask_rcnn() -> None:
    model, example = small("mask-rcnn-resnet18", head="conv"), two_objects()
    found = pws.marked(as_published(model, "mask-rcnn", example))
    bodies = {name: mark for name, mark in found.items() if name.startswith("backbone.body.")}
    assert len(bodies) == 20
    assert {(mark.gamma, mark.relative_gamma) for mark in bodies.values()} == {(1e-4, False)}
    others = {name: mark for name, mark in found.items() if name not in bodies}
    assert {name.rsplit(".", 2)[0] for name in others} == {
        *("backbone.fpn.inner_blocks", "backbone.fpn.layer_blocks", "roi_heads.box_head", "roi_heads.mask_head")
    }
    assert len(others) == 8 + 4 + 4
    assert {(mark.gamma, mark.relative_gamma) for mark in others.values()} == {(0.1, True)}
    assert {mark.gain for mark in found.values()} == {pws.PAPER_GAIN}


def test_the_published_faster_rcnn_divides_by_the_fan_out() -> None:
    model, example = small("faster-rcnn-resnet18", head="conv"), two_objects()
    result = as_published(model, "faster-rcnn", example)
    found = pws.marked(result)
    assert len(found) == 20
    stem: Any = result.get_submodule("backbone.body.conv1")
    assert found["backbone.body.conv1"].gain == pytest.approx(pws.PAPER_GAIN * (3 * 49 / (64 * 49)) ** 0.5)
    assert found["backbone.body.conv1"].gamma == 1e-5
    norms = [name for name, m in result.named_modules() if isinstance(m, torch.nn.GroupNorm)]
    assert len(norms) == 1 + 8 + 4
    assert stem.bias is not None


def test_the_published_ssd_standardizes_everything() -> None:
    result = as_published(small("ssd-vgg16"), "ssd", two_objects())
    layers = {name for name, m in result.named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert set(pws.marked(result)) == layers
    assert not any(isinstance(m, torch.nn.BatchNorm2d | torch.nn.GroupNorm) for m in result.modules())


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classification runs of ResNet-18 with bn and pws."""
    folder = tmp_path_factory.mktemp("backbones")
    write_folder(folder / "data", classes=2, images=4, side=64)
    shared = {"model.name": "torchvision:resnet18", "data.name": "folder", "data.root": str(folder / "data")}
    shared |= {"data.image_size": 64, "data.batch_size": 4, "trainer.epochs": 1, "trainer.accelerator": "cpu"}
    for method in ("bn", "pws"):
        train(recipe_of({**shared, "model.method": method}), folder / method, quiet=True)
    return folder


@pytest.mark.parametrize(("method", "run"), [("bn", "bn"), ("frozen-bn", "bn"), ("pws", "pws")])
def test_a_backbone_starts_with_the_weights_of_a_run(method: str, run: str, backbones: Path) -> None:
    recipe = tiny(model__method=method, model__backbone=str(backbones / run))
    model = module_of(recipe, data_of(recipe)).model
    theirs = torch.load(backbones / run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    own = {name: value for name, value in model.state_dict().items() if name.startswith("backbone.body.")}
    assert len(own) >= 40
    for name, value in own.items():
        assert torch.equal(value, theirs[name.replace("backbone.body.", "model.")]), name
    trained = {
        name.split(".")[2]
        for name, p in model.named_parameters()
        if name.startswith("backbone.body.") and p.requires_grad
    }
    assert trained == {"layer2", "layer3", "layer4"}


def test_a_trained_detector_does_without_the_run_of_its_backbone(backbones: Path, tmp_path: Path) -> None:
    shutil.copytree(backbones / "bn", tmp_path / "backbone")
    recipe = tiny(model__method="bn", model__backbone=str(tmp_path / "backbone"), trainer__epochs=1)
    train(recipe, tmp_path / "run", quiet=True)
    shutil.rmtree(tmp_path / "backbone")
    found = load_trained(tmp_path / "run", "last").module.state_dict()
    wanted = weights(tmp_path / "run")
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert load_run(str(tmp_path / "run")).title.endswith("with last.ckpt")
    (tmp_path / "run" / "summary.json").unlink()
    train(recipe, tmp_path / "run", resume=True, quiet=True)  # it was at its end
    own = load_run(str(tmp_path / "run")).model
    frozen = {
        n.split(".")[2] for n, p in own.named_parameters() if n.startswith("backbone.body.") and not p.requires_grad
    }
    assert frozen == {"conv1", "bn1", "layer1"}


def test_a_detector_killed_while_it_wrote_its_first_checkpoint_has_its_backbone(
    backbones: Path, tmp_path: Path
) -> None:
    recipe = tiny(model__method="bn", model__backbone=str(backbones / "bn"), trainer__epochs=1)
    train(recipe, tmp_path / "whole", quiet=True)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    written = [*(tmp_path / "killed" / "checkpoints").iterdir(), *(tmp_path / "killed").glob("[ms]*.*")]
    for path in written:  # metrics.csv and summary.json too
        path.unlink()
    left = partial_of(tmp_path / "killed" / "checkpoints" / "last.ckpt")
    left.write_bytes(b"a part of one")
    train(recipe, tmp_path / "killed", resume=True, quiet=True)
    assert not left.exists()
    found, wanted = (weights(tmp_path / name) for name in ("killed", "whole"))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model__method": "gn", "model__backbone": "RUNS/bn"}, "must be a classification run with model.method gn"),
        ({"model__method": "bn", "model__backbone": "RUNS/nothing"}, "has no recipe.yaml"),
        (
            {"model__method": "bn", "model__backbone": "RUNS/bn", "model__name": "faster-rcnn-mobilenetv3"},
            "holds a torchvision:resnet18",
        ),
        ({"model__trainable_stages": 6}, "must be 0 to 5"),
        ({"model__name": "ssd-vgg16", "model__trainable_stages": 1, "model__options": {}}, "a backbone with 5 stages"),
        ({"model__options": {"rois": 3}}, "unknown option of faster-rcnn-resnet18"),
        ({"model__name": "mask-rcnn-vgg16"}, "unknown detector"),
        ({"model__num_classes": 80}, "must be the data's number of classes"),
        ({"model__method": "ln"}, "unknown method for a model of others"),
        ({"model__name": "ssdlite-mobilenetv3", "model__width": 0.5, "model__options": {}}, "at model.width 1"),
        (
            {"model__name": "ssd-vgg16", "data__image_size": 32, "model__options": {}},
            "needs images of 64 pixels or more",
        ),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], words: str, backbones: Path) -> None:
    given = {key: v.replace("RUNS", str(backbones)) if isinstance(v, str) else v for key, v in settings.items()}
    recipe = tiny(**given)
    with pytest.raises(PwsError, match=words):
        module_of(recipe, data_of(recipe))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model.head": "conv"}, "model.head is a setting of task detect"),
        ({"model.backbone": "runs/a"}, "model.backbone is a setting of task detect"),
        ({"data.augment": "ssd"}, "data.augment is true or false for task classify"),
        ({"task": "detect", "model.dropout": 0.5}, "model.dropout is a setting of task classify"),
        ({"task": "detect", "model.calibrate": "all"}, "model.calibrate is a setting of task classify"),
        ({"task": "detect", "optim.label_smoothing": 0.1}, "optim.label_smoothing is a setting of task classify"),
    ],
)
def test_settings_of_another_task_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(PwsError, match=words):
        recipe_of(settings)


def test_frozen_stages_begin_at_the_strides() -> None:
    model = small("faster-rcnn-mobilenetv3")
    freeze_stages(model, 2)
    trained = {
        int(n.split(".")[2]) for n, p in model.named_parameters() if n.startswith("backbone.body.") and p.requires_grad
    }
    assert trained == set(range(7, 17))


def test_batches_hold_images_of_one_shape_as_long_as_there_are_enough() -> None:
    groups = [0, 0, 1, 0, 1, 0, 1, 0]
    settings: dict[str, Any] = {"seed": 3, "rank": 0, "world": 1, "accumulate": 1, "groups": groups}
    batches = [numbers for _, numbers in TrainSampler(8, 2, **settings)]
    assert sorted(number for batch in batches for number in batch) == list(range(8))
    mixed = [batch for batch in batches if len({groups[number] for number in batch}) > 1]
    assert len(mixed) == 1  # five and three images
    assert mixed[0] == batches[-1]
    plain = [numbers for _, numbers in TrainSampler(8, 2, **{**settings, "groups": [0] * 8})]
    assert plain == [numbers for _, numbers in TrainSampler(8, 2, **{**settings, "groups": None})]


def test_augmentation_depends_on_seed_epoch_and_image_alone() -> None:
    data = DetectionData(DataConfig(name="digit-scenes", batch_size=2, augment="ssd"), seed=0)
    batches = data.batches(data.splits.train, train=True)
    (first, second), _ = batches[1, [3, 5]]
    torch.manual_seed(9)
    (again,), _ = batches[1, [5]]
    (other,), _ = batches[2, [5]]
    assert torch.equal(second, again)
    assert not (second.shape == other.shape and torch.equal(second, other))
    assert first.dtype == torch.float32
    assert 0 <= float(first.min()) <= float(first.max()) <= 1


def test_a_detector_resumes_to_the_same_bits(tmp_path: Path) -> None:
    recipe = tiny(trainer__epochs=2, optim__lr=0.01, data__augment="flip")
    train(recipe, tmp_path / "whole", quiet=True)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "summary.json").unlink()
    checkpoints = tmp_path / "cut" / "checkpoints"
    (checkpoints / "before.ckpt").replace(checkpoints / "last.ckpt")
    train(recipe, tmp_path / "cut", resume=True, quiet=True)
    found, wanted = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
