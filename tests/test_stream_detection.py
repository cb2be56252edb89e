"""Detection in shards: `pws pack` of COCO's files, and `data.name: stream` with task detect."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_folder import POINTS, SHAPES, content_of, write_parts
from detect_data import coco_content
from PIL import Image
from small_data import write_folder
from small_detectors import FEW
from torch import Tensor, nn

from pws._errors import PwsError
from pws.cli import main
from pws.training.data import ImageData
from pws.training.detect.coco import CocoImages
from pws.training.detect.data import DetectionData
from pws.training.detect.datasets import load_detection_splits
from pws.training.detect.pack_source import coco_source
from pws.training.detect.samples import DetectionSplits
from pws.training.detect.stream import StreamObjects
from pws.training.detect.write_scenes import SceneSettings, write_scenes
from pws.training.pack import Progress, pack
from pws.training.pack_sources import Source, source_of
from pws.training.recipe import DataConfig
from pws.training.recipe_file import recipe_of
from pws.training.samplers import TrainSampler
from pws.training.stream import litdata
from pws.training.tasks import data_of, module_of

PER_SHARD = 3


def shards_of_three(root: Path, *, keypoints: bool = False) -> Source:
    source = coco_source(root, keypoints=keypoints)
    small = replace(source, bytes=source.images * 2**26 // PER_SHARD)
    assert small.shard_images() == PER_SHARD
    return small


def quiet(*_: object) -> None: ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("coco"), {"train": content_of(13), "test": content_of(4)})


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    pack(shards_of_three(folder), out, 1, quiet)
    return out


def of(name: str, root: Path | str, **settings: Any) -> DetectionSplits:
    return load_detection_splits(DataConfig(name=name, root=str(root), **{"validation": 0, **settings}), seed=0)


def numbers_by_name(images: Any) -> dict[str, int]:
    if isinstance(images, CocoImages):
        return {image.name: number for number, image in enumerate(images.images)}
    return {images.name(number): number for number in range(len(images))}


def assert_same_sample(found: tuple[Tensor, Any], expected: tuple[Tensor, Any]) -> None:
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for key, value in expected[1].items():
        assert (type(found[1][key]), found[1][key].dtype) == (type(value), value.dtype)
        assert torch.equal(found[1][key], value), key
    assert found[1]["boxes"].canvas_size == expected[1]["boxes"].canvas_size


def assert_same(found: DetectionSplits, expected: DetectionSplits) -> None:
    assert found.classes == expected.classes
    for images, others in ((found.train, expected.train), (found.test, expected.test)):
        assert len(images) == len(others)
        assert (images.has_masks, images.keypoint_names) == (others.has_masks, others.keypoint_names)
        assert_samples(images, others)


def assert_samples(images: Any, others: Any) -> None:
    """Each of the images is one of the others, by its name."""
    numbers = numbers_by_name(others)
    for name, number in numbers_by_name(images).items():
        assert images.size(number) == others.size(numbers[name])
        assert_same_sample(images.get(number), others.get(numbers[name]))


def test_samples_are_those_of_the_folder(folder: Path, packed: Path) -> None:
    expected, found = of("coco", folder), of("stream", packed)
    assert_same(found, expected)
    assert (found.train.has_masks, found.train.keypoint_names) == (True, POINTS)
    targets = [found.train.get(number)[1] for number in range(13)]
    assert sorted(len(target["boxes"]) for target in targets) == [0] * 3 + [3] * 10
    assert {int(target["iscrowd"].sum()) for target in targets} == {0, 1}
    assert list(numbers_by_name(found.test)) == list(numbers_by_name(expected.test))
    assert list(numbers_by_name(found.train)) != list(numbers_by_name(expected.train)), "in an order drawn once"


def test_files_keep_their_bytes(folder: Path, packed: Path) -> None:
    data = litdata().StreamingDataset(str(packed / "test"), batch_decode=0)
    for number in range(4):
        file, objects, name = data[number]
        assert bytes(file) == (folder / "test" / bytes(name).decode()).read_bytes()
        assert len(json.loads(bytes(objects))) == (0 if number == 3 else 3)


@pytest.mark.parametrize("masks", ["both", "train", "none"])
def test_masks_are_those_of_each_part(masks: str, tmp_path: Path) -> None:
    contents = {"train": content_of(4), "test": content_of(4)}
    for part in {"both": [], "train": ["test"], "none": ["train", "test"]}[masks]:
        for record in contents[part]["annotations"]:
            record["segmentation"] = []
    root = write_parts(tmp_path / "coco", contents)
    pack(coco_source(root, keypoints=False), tmp_path / "out", 1, quiet)
    found = of("stream", tmp_path / "out")
    assert (found.train.has_masks, found.test.has_masks) == (masks != "none", masks == "both")
    assert_same(found, of("coco", root))


def test_scenes(tmp_path: Path) -> None:
    (tmp_path / "scenes").mkdir()
    write_scenes(tmp_path / "scenes", SceneSettings("digits", train=4, test=2, size=48), 1, quiet)
    pack(coco_source(tmp_path / "scenes", keypoints=False), tmp_path / "out", 1, quiet)
    found = of("stream", tmp_path / "out")
    assert len(found.train.keypoint_names) == 4
    assert_same(found, of("scenes", tmp_path))


@pytest.mark.parametrize("name", ["coco", "coco-keypoints"])
def test_both_of_cocos_own_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = coco_content()
    with_points = {**content, "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog", "keypoints": POINTS}]}
    parts = ("train2017", "val2017")
    contents = {f"instances_{part}": content for part in parts}
    root = write_parts(tmp_path / "coco", {**contents, **{f"person_keypoints_{part}": with_points for part in parts}})
    flags = ["--keypoints"] if name == "coco-keypoints" else []
    assert main(["pack", str(root), str(tmp_path / "out"), "--jobs=1", *flags]) == 0
    assert "2 train, 2 test images in 2 shards" in " ".join(capsys.readouterr().out.split())
    found = of("stream", tmp_path / "out")
    assert found.train.keypoint_names == (POINTS if flags else [])
    assert_same(found, of(name, root))


def test_a_training_step_has_the_losses_of_the_folder(folder: Path, packed: Path) -> None:
    batches = {}
    for name, root in (("coco", folder), ("stream", packed)):
        recipe = recipe_of(
            {
                **{"task": "detect", "model.name": "faster-rcnn-resnet18", "model.width": 0.05, "model.options": FEW},
                **{"model.anchor_size": 16, "data.name": name, "data.root": str(root), "data.image_size": 64},
                **{"data.validation": 0, "data.batch_size": 3},
            }
        )
        data = data_of(recipe)
        numbers = numbers_by_name(data.splits.train)
        wanted = [numbers[file] for file in ("5.jpg", "3.jpg", "10.png")]
        batches[name] = data.batches(data.splits.train, train=True)[0, wanted]
    # One network for both: its gains are measured on the first images, and those are others in a shard.
    module = module_of(recipe, data)
    found = {name: losses_of(module.model, *batch) for name, batch in batches.items()}
    assert len(found["coco"]) == 5
    assert all(value > 0 for value in found["coco"].values())
    assert found["stream"] == found["coco"]


def losses_of(model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, float]:
    """The losses of a step, and the sum of the gradients' sizes."""
    torch.manual_seed(0)
    losses = model.train()(images, targets)
    gradients = torch.autograd.grad(sum(losses.values()), [p for p in model.parameters() if p.requires_grad])
    return {name: loss.item() for name, loss in losses.items()} | {
        "gradients": sum(g.abs().sum().item() for g in gradients)
    }


def test_batches_hold_one_shape_and_go_through_the_shards(
    folder: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pws.training.stream.WINDOW", 1)
    monkeypatch.setenv("LITDATA_CACHE_DIR", str(tmp_path))
    data = DetectionData(DataConfig(name="stream", root=f"local:{packed}", batch_size=2, validation=0), seed=0)
    train, sampler = data.splits.train, data.train_dataloader().sampler
    assert isinstance(train, StreamObjects)
    assert isinstance(sampler, TrainSampler)
    assert sampler.order == train.order
    order = (train.order(torch.Generator().manual_seed(0)) // PER_SHARD).tolist()
    assert order != sorted(order)
    assert len([n for n in range(1, 13) if order[n] != order[n - 1]]) == 4, "one shard after the other"
    groups = data.groups()
    assert groups is not None
    batches = [numbers for _, numbers in sampler]
    assert not list(tmp_path.rglob("*.bin")), "no image is read for it"
    assert len({number for numbers in batches for number in numbers}) == 12
    assert all(len({groups[number] for number in numbers}) == 1 for numbers in batches[:5])
    sizes = {name: SHAPES[int(Path(name).stem) % 4] for name in numbers_by_name(train)}
    assert groups == [int(height > width) for height, width in sizes.values()]


def test_held_out_images_and_an_order_of_those_left(folder: Path, packed: Path) -> None:
    data = DetectionData(DataConfig(name="stream", root=str(packed), validation=0.25, batch_size=2), seed=0)
    train, validation = data.splits.train, data.splits.validation
    assert isinstance(train, StreamObjects)
    assert validation is not None
    names = set(numbers_by_name(train)), set(numbers_by_name(validation))
    assert [len(found) for found in names] == [10, 3]
    assert not names[0] & names[1]
    assert sorted(train.order(torch.Generator()).tolist()) == list(range(10))
    for images in (train, validation):
        assert_samples(images, of("coco", folder).train)


@pytest.mark.parametrize("augment", ["flip", "jitter"])
def test_loader_processes_and_a_url_give_the_same_batches(
    augment: Any, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITDATA_CACHE_DIR", str(tmp_path))
    plain = {"name": "stream", "augment": augment, "batch_size": 3, "validation": 0}
    here = DetectionData(DataConfig(root=str(packed), **plain), 4)
    there = DetectionData(DataConfig(root=f"local:{packed}", workers=2, **plain), 4)
    for (images, targets), (others, theirs) in zip(here.train_dataloader(), there.train_dataloader(), strict=True):
        assert all(map(torch.equal, images, others))
        for target, other in zip(targets, theirs, strict=True):
            assert all(torch.equal(target[key], other[key]) for key in target)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def interrupted(shards: int) -> Progress:
    def progress(doing: str, done: int, total: int) -> None:
        if done == shards * PER_SHARD:
            raise KeyboardInterrupt

    return progress


def test_an_interrupted_packing_goes_on(folder: Path, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        pack(shards_of_three(folder), out, 1, interrupted(2))
    with pytest.raises(PwsError, match="not finished"):
        of("stream", out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.bin")}
    assert len(before) == 2
    said: list[tuple[str, int, int]] = []
    pack(shards_of_three(folder), out, 1, lambda *arguments: said.append(arguments))
    assert said[0] == ("packing", 6, 17)
    assert said[-1] == ("verifying", 7, 7)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert files_of(out) == files_of(packed)


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a box": lambda c: c["annotations"][0].update(bbox=[4, 2.25, 18, 17.5]),
    "a class's name": lambda c: c["categories"][0].update(name="cow"),
    "one object fewer": lambda c: c["annotations"].pop(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_it_does_not_go_on_with_other_objects(change: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    contents = {"train": content_of(4), "test": content_of(4)}
    root = write_parts(tmp_path / "coco", contents)
    with pytest.raises(KeyboardInterrupt):
        pack(shards_of_three(root), tmp_path / "out", 1, interrupted(1))
    for part, content in contents.items():
        change(content)
        (root / "annotations" / f"{part}.json").write_text(json.dumps(content))
    with pytest.raises(PwsError, match="an unfinished packing of other images"):
        pack(shards_of_three(root), tmp_path / "out", 1, quiet)


def test_each_task_has_packs_of_its_own(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits = tmp_path / "digits"
    pack(source_of("digits", "", None, download=False), digits, 1, quiet)
    for recipe, root, of_pack, wanted in (
        ("scenes-faster-rcnn", digits, "classify", "detect"),
        ("fashion-mnist-allconv-pws", packed, "detect", "classify"),
    ):
        flags = ("--data.name=stream", f"--data.root={root}", f"--runs={tmp_path / 'runs'}")
        assert main(["train", recipe, *flags]) == 2
        error = capsys.readouterr().err
        told = f"{root} holds images that were packed for task {of_pack}, and this recipe's task is {wanted}."
        assert error.startswith(f"pws: {told}")
        assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()
    with pytest.raises(PwsError, match="packed for task detect"):
        ImageData(DataConfig(name="stream", root=f"local:{packed}"), seed=0)


WRONG: dict[str, tuple[Sequence[str], str]] = {
    "size": (["coco", "out", "--size=32"], "--size is for images of classes"),
    "keypoints of classes": (["photos", "out", "--keypoints"], "--keypoints is for a folder of COCO"),
    "keypoints of no images": (["digits", "out", "--keypoints"], "--keypoints is for a folder of COCO"),
    "an image is missing": (["lost", "out"], "names 1 images that are not in lost/train"),
    "one part": (["half", "out"], "half/annotations must hold instances_train2017.json and"),
}


@pytest.mark.parametrize(("arguments", "told"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_told_in_a_line(
    arguments: Sequence[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("coco", "lost", "half"):
        write_parts(tmp_path / name, {"train": content_of(1), "test": content_of(1)})
    write_folder(tmp_path / "photos", classes=2, images=1, side=8)
    (tmp_path / "lost" / "train" / "0.png").unlink()
    (tmp_path / "half" / "annotations" / "test.json").unlink()
    assert main(["pack", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pws: ")
    assert told in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def own_copy(packed: Path, out: Path) -> Path:
    for name, content in files_of(packed).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    return out


DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no task": lambda c: c.pop("task"),
    "an unknown task": lambda c: c.update(task="segment"),
    "the other task": lambda c: c.update(task="classify"),
    "no sizes": lambda c: c.pop("sizes"),
    "a size is missing": lambda c: c["sizes"]["train"].pop(),
    "sizes of a part are missing": lambda c: c["sizes"].pop("test"),
    "a size of three": lambda c: c["sizes"]["train"][0].append(3),
    "a size of words": lambda c: c["sizes"]["train"].__setitem__(0, ["a", "b"]),
    "an empty image": lambda c: c["sizes"]["train"].__setitem__(0, [0, 5]),
    "masks of one part": lambda c: c["about"]["masks"].pop("test"),
    "keypoints of another part": lambda c: c["about"]["keypoints"].update(val=[]),
}


@pytest.mark.parametrize("change", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_index_is_refused_at_the_start(
    change: Callable[[dict[str, Any]], object], packed: Path, tmp_path: Path
) -> None:
    index = own_copy(packed, tmp_path) / "pws.json"
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))
    with pytest.raises(PwsError) as raised:
        of("stream", tmp_path)
    assert str(raised.value).startswith(str(index))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (b'"label"', b'"lab l"', "the objects of 0.png are damaged"),
        (b'[{"label', b'[}"label', "the objects of 0.png are damaged"),
        (b"\x89PNG", b"\x89ONG", "cannot read the image 0.png"),
    ],
)
def test_a_damaged_shard_is_told_by_its_image(old: bytes, new: bytes, told: str, packed: Path, tmp_path: Path) -> None:
    shard = own_copy(packed, tmp_path) / "test" / "chunk-0-0.bin"
    content = shard.read_bytes()
    assert old in content
    shard.write_bytes(content.replace(old, new, 1))
    with pytest.raises(PwsError, match=told):
        of("stream", tmp_path).test.get(0)


def test_an_image_of_another_size_than_its_objects(tmp_path: Path) -> None:
    root = write_parts(tmp_path / "coco", {"train": content_of(4), "test": content_of(4)})
    Image.new("RGB", (8, 9)).save(root / "test" / "2.png")
    pack(coco_source(root, keypoints=False), tmp_path / "out", 1, quiet)
    with pytest.raises(PwsError, match=r"2\.png is 50 x 50 pixels there, and the file itself 8 x 9"):
        of("stream", tmp_path / "out").test.get(2)
