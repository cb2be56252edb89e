"""`data.name: stream`: the images of the packed dataset, shard by shard, whole or refused."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_data import write_folder
from torch import Tensor

from pws._errors import PwsError
from pws.cli import main
from pws.training.data import ImageBatches, ImageData
from pws.training.datasets import load_splits
from pws.training.images import Splits, TensorImages
from pws.training.pack import pack
from pws.training.pack_sources import source_of
from pws.training.recipe import DataConfig, Recipe, TaskName
from pws.training.samplers import TrainSampler
from pws.training.stream import StreamImages, drawn_by_shards


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "digits"
    pack(source_of("digits", "", None, download=False), out, 1, lambda *_: None)
    return out


@pytest.fixture
def own_digits(digits: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    for path in digits.rglob("*.*"):
        (tmp_path / path.relative_to(digits)).parent.mkdir(exist_ok=True)
        (tmp_path / path.relative_to(digits)).write_bytes(path.read_bytes())
    return tmp_path


def of(root: Path | str, **settings: Any) -> Splits:
    return load_splits(DataConfig(name="stream", root=str(root), **{"validation": 0, **settings}), seed=0)


def test_the_images_are_those_that_were_packed(digits: Path) -> None:
    memory, stream = load_splits(DataConfig(name="digits", validation=0), seed=0), of(digits)
    assert (stream.classes, stream.mean, stream.std) == (memory.classes, list(memory.mean), list(memory.std))
    for part, expected in zip(stream.test.get(list(range(360))), memory.test.get(list(range(360))), strict=True):
        assert torch.equal(part, expected)
    numbers = [int(stream.train.name(number).removeprefix("train/")) for number in range(len(stream.train))]
    assert sorted(numbers) == list(range(1437))
    assert numbers != sorted(numbers), "neighbours in a file are not neighbours in a shard"
    for part, expected in zip(stream.train.get(list(range(1437))), memory.train.get(numbers), strict=True):
        assert torch.equal(part, expected)


@pytest.mark.parametrize("side", [None, 12])
def test_they_are_augmented_as_in_memory(digits: Path, side: int | None) -> None:
    memory = load_splits(DataConfig(name="digits", augment=True, image_size=side, validation=0), seed=0)
    stream = of(digits, augment=True, image_size=side)
    numbers = [int(stream.train.name(number).removeprefix("train/")) for number in range(20)]
    same = TensorImages(*memory.train.get(numbers), memory.train.augment)
    expected, found = ImageBatches(same, memory, 5), ImageBatches(stream.train, stream, 5)
    for part, other in zip(found[3, list(range(20))], expected[3, list(range(20))], strict=True):
        assert torch.equal(part, other)


def test_photographs_are_those_of_the_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", classes=2, images=3, side=40)
    pack(source_of(str(tmp_path / "photos"), "", None, download=False), tmp_path / "out", 1, lambda *_: None)
    config = DataConfig(name="folder", root=str(tmp_path / "photos"), image_size=32, validation=0)
    folder, stream = load_splits(config, seed=0), of(tmp_path / "out", image_size=32)
    assert stream.classes == folder.classes == ["class0", "class1"]
    assert [stream.test.name(n) for n in range(6)] == [folder.test.name(n) for n in range(6)]
    for part, expected in zip(stream.test.get(list(range(6))), folder.test.get(list(range(6))), strict=True):
        assert torch.equal(part, expected)
    names = [folder.train.name(number) for number in range(6)]
    numbers = [names.index(stream.train.name(number)) for number in range(6)]
    for part, expected in zip(stream.train.get(list(range(6))), folder.train.get(numbers), strict=True):
        assert torch.equal(part, expected)


def test_validation_images_are_held_out(digits: Path) -> None:
    splits = of(digits, validation=0.1, train_images=100)
    assert splits.validation is not None
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (100, 10, 360)
    names = [{images.name(n) for n in range(len(images))} for images in (splits.train, splits.validation)]
    assert not names[0] & names[1]


def test_an_order_goes_through_some_shards_at_a_time() -> None:
    shards = torch.arange(100).repeat_interleave(torch.arange(100) % 3 + 1)
    order = drawn_by_shards(shards, 100, torch.Generator().manual_seed(0), window=8)
    assert sorted(order.tolist()) == list(range(len(shards)))
    left, windows = order.tolist(), []
    while left:
        window = set[int]()
        count = 0
        for number in left:
            if len(window | {int(shards[number])}) > 8:
                break
            window.add(int(shards[number]))
            count += 1
        windows.append(window)
        left = left[count:]
    assert [len(window) for window in windows] == [8] * 12 + [4]
    assert set.union(*windows) == set(range(100))
    assert sorted(windows[0]) != list(range(8))
    first = [int(shards[number]) for number in order[:10]]
    assert first != sorted(first), "the images of a window are mixed"


def test_the_order_is_that_of_seed_and_epoch(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orders = [drawn(digits, seed, epoch) for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3
    assert len({number for numbers in orders[0] for number in numbers}) == 1200
    monkeypatch.setattr("pws.training.stream.WINDOW", 1)
    first, *_, last = drawn(digits, 0, 0, train_images=1200)
    assert len({number < 1000 for number in first}) == len({number < 1000 for number in last}) == 1


def drawn(root: Path, seed: int, epoch: int, **settings: Any) -> list[tuple[int, ...]]:
    """The numbers of each batch among all images of the shards."""
    data = ImageData(DataConfig(name="stream", root=str(root), batch_size=100, **settings), seed)
    sampler = data.train_dataloader().sampler
    assert hasattr(sampler, "set_epoch")
    sampler.set_epoch(epoch)
    train = data.splits.train
    assert isinstance(train, StreamImages)
    assert train.numbers is not None
    return [tuple(train.numbers[number] for number in numbers) for _, numbers in sampler]


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (2, 2)])
def test_processes_share_out_the_batches_of_one(digits: Path, world: int, accumulate: int) -> None:
    train = of(digits).train
    assert isinstance(train, StreamImages)
    settings: dict[str, Any] = {"seed": 3, "order": train.order}
    whole = [batch for _, batch in TrainSampler(1437, 100, rank=0, world=1, accumulate=1, **settings)]
    shares = [
        [part for _, part in TrainSampler(1437, 100, rank=rank, world=world, accumulate=accumulate, **settings)]
        for rank in range(world)
    ]
    for step, batch in enumerate(whole):
        parts = [part for share in shares for part in share[step * accumulate : (step + 1) * accumulate]]
        assert sorted(number for part in parts for number in part) == sorted(batch)
        assert {len(part) for part in parts} == {100 // (world * accumulate)}


def test_images_go_to_another_process(digits: Path) -> None:
    train = of(digits).train
    expected = train.get([1, 1400])
    assert all(map(torch.equal, pickle.loads(pickle.dumps(train)).get([1, 1400]), expected))


def test_loader_processes_and_a_url_give_the_same_batches(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITDATA_CACHE_DIR", str(tmp_path))
    here = ImageData(DataConfig(name="stream", root=str(digits), augment=True, batch_size=256), 4)
    there = ImageData(DataConfig(name="stream", root=f"local:{digits}", augment=True, batch_size=256, workers=2), 4)
    assert not list(tmp_path.rglob("*.bin"))
    for a, b in zip(here.train_dataloader(), there.train_dataloader(), strict=True):
        assert all(map(torch.equal, a, b))
    assert len(list(tmp_path.rglob("*.bin"))) == 2
    assert not list(tmp_path.rglob("*.tmp*"))


def test_a_shard_is_copied_when_it_is_needed(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITDATA_CACHE_DIR", str(tmp_path))
    splits = of(f"local:{digits}")
    splits.train.get([3, 999])
    assert [path.name for path in tmp_path.rglob("*.bin")] == ["chunk-0-0.bin"]
    assert isinstance(splits.train, StreamImages)
    splits.train.get([1000])
    assert len(list(tmp_path.rglob("*.bin"))) == 2


def damaged_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(root: Path) -> None:
        content = json.loads((root / "pws.json").read_text())
        change(content)
        (root / "pws.json").write_text(json.dumps(content))

    return damage


SHARD = "train/chunk-0-1.bin"
DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a shard is missing": (lambda root: (root / SHARD).unlink(), SHARD, "is missing. Copy the packed folder again"),
    "a shard is cut off": (lambda root: (root / SHARD).write_bytes(b"12"), SHARD, "has 2 bytes, and had "),
    "a shard is longer": (lambda root: (root / SHARD).open("ab").write(b"1"), SHARD, "it is cut off or of another"),
    "litdata's index is missing": (lambda root: (root / "test/index.json").unlink(), "test/index.json", "is missing"),
    "no packed images": (lambda root: (root / "pws.json").unlink(), "pws.json", "packing was not finished"),
    "another version": (damaged_index(lambda c: c.update(version=2)), "pws.json", "is of version 2 of the format"),
    "no version": (damaged_index(lambda c: c.pop("version")), "pws.json", "is damaged"),
    "no parts": (damaged_index(lambda c: c.pop("parts")), "pws.json", "is damaged"),
    "no test part": (damaged_index(lambda c: c["parts"].pop("test")), "pws.json", "is damaged"),
    "a shard elsewhere": (damaged_index(lambda c: c["parts"]["test"][0].update(file="../x")), "pws.json", "is damaged"),
    "words for numbers": (damaged_index(lambda c: c["about"].update(channels="x")), "pws.json", "channels"),
    "no JSON": (lambda root: (root / "pws.json").write_text("{"), "pws.json", "is damaged"),
}


@pytest.mark.parametrize(("damage", "file", "told"), DAMAGES.values(), ids=DAMAGES)
def test_what_is_not_whole_is_refused_at_the_start(
    damage: Callable[[Path], object], file: str, told: str, own_digits: Path
) -> None:
    damage(own_digits)
    with pytest.raises(PwsError, match=told) as raised:
        of(own_digits)
    assert str(own_digits / file) in str(raised.value)


@pytest.mark.parametrize("kind", ["missing", "cut off"])
def test_a_url_whose_shard_is_not_whole(
    kind: str, own_digits: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITDATA_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    splits = of(f"local:{own_digits}")
    (own_digits / SHARD).unlink() if kind == "missing" else (own_digits / SHARD).write_bytes(b"12")
    with pytest.raises(PwsError, match=r"chunk-0-1\.bin"):
        splits.train.get([1200])


def test_the_command_says_it_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = [
        "train",
        "fashion-mnist-allconv-pws",
        "--data.name=stream",
        f"--data.root={tmp_path}",
        f"--runs={tmp_path}",
    ]
    assert main(recipe) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pws: {tmp_path}/pws.json is missing")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_litdata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "litdata.streaming.downloader", None)
    with pytest.raises(PwsError, match=r"pip install 'pws-torch\[stream\]'"):
        of(tmp_path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images per class of which the second of class0 and the first of class1 can't be decoded."""
    write_folder(tmp_path / "photos", classes=2, images=3, side=40)
    for name in ("class0/1.png", "class1/0.png"):
        path = tmp_path / "photos" / "train" / name
        path.write_bytes(path.read_bytes()[:60])
    return tmp_path / "photos"


def with_corrupt(photos: Path, kind: str, max_corrupt: int, **settings: Any) -> DataConfig:
    root = photos
    if kind == "stream":
        root = photos.parent / "packed"
        if not root.exists():
            pack(source_of(str(photos), "", None, download=False), root, 1, lambda *_: None)
    plain = {"image_size": 32, "validation": 0, "max_corrupt": max_corrupt}
    return DataConfig(name=kind, root=str(root), **{**plain, **settings})


@pytest.mark.parametrize("kind", ["folder", "stream"])
def test_corrupt_images_are_replaced_up_to_the_limit(
    kind: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = load_splits(with_corrupt(photos, kind, 2), seed=0).train
    names = [images.name(number) for number in range(6)]
    expected = [
        next(n % 6 for n in range(k, k + 6) if names[n % 6] not in ("class0/1.png", "class1/0.png")) for k in range(6)
    ]
    assert sum(number != k for k, number in enumerate(expected)) == 2
    first, second = images.get(list(range(6))), images.get(list(range(6)))
    replaced: list[Tensor] = [images.get([number])[0][0] for number in expected]
    assert all(map(torch.equal, first, second))
    assert torch.equal(first[0], torch.stack(replaced))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2, "each is told once"
    assert all(line.startswith("pws: cannot read the image") for line in lines)
    assert {name for name in names for line in lines if name in line} == {"class0/1.png", "class1/0.png"}
    assert "corrupt image 2 of 2 that data.max_corrupt allows" in lines[1]


@pytest.mark.parametrize("kind", ["folder", "stream"])
@pytest.mark.parametrize(
    ("limit", "told"), [(0, "--data.max_corrupt N skips"), (1, "corrupt image 2; data.max_corrupt")]
)
def test_beyond_the_limit_they_end_the_run(kind: str, limit: int, told: str, photos: Path) -> None:
    images = load_splits(with_corrupt(photos, kind, limit), seed=0).train
    for _ in range(2):
        with pytest.raises(PwsError, match=told) as raised:
            images.get(list(range(6)))
        assert "class0/1.png" in str(raised.value) or "class1/0.png" in str(raised.value)


@pytest.mark.parametrize(("limit", "fails"), [(2, False), (1, True)])
def test_loader_processes_count_together(limit: int, fails: bool, photos: Path) -> None:
    config = with_corrupt(photos, "folder", limit, batch_size=1, workers=2)
    loader = ImageData(config, seed=0).train_dataloader()
    if fails:
        with pytest.raises(PwsError, match="corrupt image 2"):
            list(loader)
    else:
        assert len(list(loader)) == 6


def test_no_image_can_be_decoded(photos: Path) -> None:
    for path in (photos / "train").rglob("*.png"):
        path.write_bytes(b"")
    images = load_splits(with_corrupt(photos, "folder", 100), seed=0).train
    with pytest.raises(PwsError, match="none of the 6 images can be decoded"):
        images.get([0])


@pytest.mark.parametrize(
    ("task", "limit", "told"), [("classify", -1, "data.max_corrupt must be at least 0"), ("detect", 1, "task classify")]
)
def test_limits_that_no_recipe_has(task: TaskName, limit: int, told: str) -> None:
    with pytest.raises(PwsError, match=told):
        Recipe(task=task, data=DataConfig(max_corrupt=limit))
