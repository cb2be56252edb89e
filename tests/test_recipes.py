"""Every shipped recipe is loaded and trained for a step, on small images in place of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from small_data import write_folder, write_npz

from pws._errors import PwsError
from pws.training import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    TrainerConfig,
    load_recipe,
    shipped_recipes,
    train,
)
from pws.training.datasets import DATASETS
from pws.training.recipe_file import recipe_of

SMALL = (
    "--model.width=0.125",
    "--data.batch_size=4",
    "--data.workers=0",
    "--trainer.max_steps=1",
    "--trainer.epochs=1",
)
PUBLISHED = {"allconv": 2, "wrn16-4": 2, "preact": 2, "cifar-resnet34": 3, "resnet50": 3}
DETECTORS = {
    **{"mask-rcnn-resnet50": 2, "faster-rcnn-resnet50": 2, "ssd-vgg16": 3},
    **{"mask-rcnn-resnet18": 1, "faster-rcnn-resnet18": 1},
}
QUICK = {
    **dict.fromkeys(("box_batch_size_per_image", "rpn_pre_nms_top_n_train", "rpn_post_nms_top_n_train"), 16),
    **dict.fromkeys(("rpn_pre_nms_top_n_test", "rpn_post_nms_top_n_test", "box_detections_per_img"), 4),
}


def recipes(task: str = "classify") -> list[Path]:
    return [path for path in shipped_recipes() if load_recipe(path).task == task]


def test_all_are_here() -> None:
    detectors = [load_recipe(path).model.name for path in recipes("detect")]
    assert {name: detectors.count(name) for name in detectors} == DETECTORS
    names = [load_recipe(path).model.name for path in recipes()]
    assert len(names) == 15
    fashion = [path for path in recipes() if path.stem.startswith("fashion-mnist")]
    assert len(fashion) == 2
    for name, count in PUBLISHED.items():
        assert names.count(name) == count + (2 if name == "allconv" else 0)


@pytest.mark.parametrize("path", recipes(), ids=lambda path: path.stem)
def test_one_step(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.data.name in DATASETS
    if recipe.data.name in ("imagenet", "folder"):
        write_folder(tmp_path / "data", classes=3, images=3, side=70)
        flags = [f"--data.root={tmp_path / 'data'}", "--model.num_classes=3", "--data.image_size=64"]
        flags += ["--model.width=1"] if ":" in recipe.model.name else []
    else:
        channels, side = (1, 28) if recipe.data.name == "fashion-mnist" else (3, 32)
        write_npz(tmp_path / "data.npz", channels=channels, side=side)
        flags = ["--data.name=npz", f"--data.root={tmp_path / 'data.npz'}"]
    summary = train(load_recipe(path, *SMALL, *flags), tmp_path / "run", quiet=True)
    assert (summary.status, summary.steps) == ("finished", 1)


SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in ("bn", "gn", "pws-paper")]


@pytest.mark.parametrize("method", [*SLOW, "pws"])
@pytest.mark.parametrize("path", recipes("detect"), ids=lambda path: path.stem)
def test_one_step_of_a_detector(path: Path, method: str, tmp_path: Path) -> None:
    small = load_recipe(path, *SMALL, "--data.name=digit-scenes", "--data.image_size=64", f"--model.method={method}")
    if "rcnn" in small.model.name:
        small = replace(small, model=replace(small.model, options=QUICK))
    summary = train(
        replace(small, data=replace(small.data, batch_size=2, train_images=4)), tmp_path / "run", quiet=True
    )
    assert (summary.status, summary.steps) == ("finished", 1)
    assert summary.metrics.keys() >= ({"box_ap", "mask_ap"} if "mask" in path.stem else {"box_ap"})


@pytest.mark.parametrize("path", [p for p in recipes() if p.stem.endswith("-pws")], ids=lambda path: path.stem)
def test_pws_recipes_say_whether_they_calibrate(path: Path) -> None:
    assert "calibrate:" in path.read_text()
    assert load_recipe(path).model.calibrate == ("initalpha" if "imagenet" in path.stem else "none")


def test_published_settings_of_detectors() -> None:
    mask, ssd = load_recipe("coco-mask-rcnn"), load_recipe("voc-ssd")
    assert (mask.optim.lr, mask.data.batch_size, mask.optim.weight_decay, mask.data.image_size) == (
        0.0025,
        2,
        1e-4,
        800,
    )
    assert (mask.optim.milestones, mask.trainer.epochs) == ([16, 22], 24)
    steps_per_epoch = 117_266 / 2  # COCO's training images with objects
    assert mask.optim.warmup_epochs * steps_per_epoch == pytest.approx(500, rel=0.01)
    faster = load_recipe("coco-faster-rcnn")
    assert (faster.optim.milestones, faster.trainer.epochs) == ([34, 37], 39)
    assert (ssd.optim.lr, ssd.optim.weight_decay, ssd.data.image_size) == (0.01, 5e-4, 320)
    assert (ssd.optim.milestones, ssd.trainer.epochs) == ([90, 170, 240], 250)
    assert load_recipe("coco-ssd").optim.milestones == [120, 200, 260]
    for name, head in (("coco-mask-rcnn", "mlp"), ("coco-mask-rcnn-conv", "conv"), ("coco-faster-rcnn-conv", "conv")):
        assert load_recipe(name).model.head == head


def test_published_settings() -> None:
    resnet50 = load_recipe("imagenet-resnet50-pws")
    assert (resnet50.optim.lr, resnet50.data.batch_size, resnet50.optim.weight_decay) == (0.025, 64, 1e-4)
    assert (resnet50.model.gamma, resnet50.model.calibrate) == (1e-4, "initalpha")
    assert resnet50.model.method == "pws-paper"
    allconv = load_recipe("cifar10-allconv-pws")
    assert (allconv.optim.lr, allconv.optim.weight_decay, allconv.trainer.epochs) == (0.1, 5e-4, 200)
    assert (allconv.optim.schedule, allconv.optim.milestones) == ("step", [100, 150, 180])


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: OptimConfig(lr=-1), "optim.lr must be at least 0; got -1"),
        (lambda: OptimConfig(clip_norm=1.0, step_bound=1), "both clip the gradient"),
        (lambda: DataConfig(batch_size=0), "data.batch_size must be at least 1"),
        (lambda: ModelConfig(width=0), "model.width must be positive"),
        (lambda: TrainerConfig(strategy="fsdp"), "trainer.strategy must be auto, ddp"),
        (lambda: Recipe(name="a/b"), "name is a folder's name"),
        (lambda: replace(Recipe(), seed=-1), "seed must be at least 0"),
        (lambda: recipe_of({"optim.schedule": "step"}), "needs optim.milestones"),
    ],
)
def test_a_recipe_made_in_python_keeps_the_same_rules(made: Callable[[], object], words: str) -> None:
    with pytest.raises(PwsError, match=words):
        made()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("optim: {lr: -1}", "optim.lr must be at least 0; got -1"),
        ("optim: {lr: null}", "optim.lr must have a value"),
        ("trainer: {precision: 32}", r"trainer.precision: Expected a str. Got value: 32 \(put it in quotes\)"),
        ("optim: {lr: fast}", "optim.lr: Expected a float. Got value: fast"),
        ("optim: {lrr: 1}", "unknown recipe key .* did you mean optim.lr"),
    ],
)
def test_an_error_names_the_file_and_the_key(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(PwsError, match=words) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)


def test_flags_mend_what_the_file_alone_breaks(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("optim: {schedule: step, lr: 1e-3}")
    recipe = load_recipe(path, "--optim.milestones=[3]")
    assert (recipe.name, recipe.optim.lr, recipe.optim.milestones) == ("mine", 0.001, [3])
