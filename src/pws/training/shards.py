"""The shards of a packed dataset: what their list, pws.json, says of them, and whether the files are what it says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from pws._errors import PwsError, shown
from pws.training.parsing import parse_as
from pws.training.recipe import TaskName

VERSION: Final = 1
"""Of the layout of a packed dataset; the shards themselves are litdata's."""
INDEX: Final = "pws.json"
PARTS: Final = ("train", "val", "test")
LITDATA_INDEX: Final = "index.json"
Label = int | bytes
"""An image's class, or its objects in JSON."""
StoredImage = tuple[bytes, Label, bytes]
"""What a shard holds of an image: the bytes of a file, the label, the name."""
Sizes = dict[str, list[tuple[int, int]]]
"""Height and width of each image of each part."""


@dataclass(frozen=True)
class Shard:
    """A file of images."""

    file: str
    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ImagesIndex:
    """What the images of a packed dataset are."""

    classes: list[str]
    mean: list[float]
    """The mean of each channel's pixels; bytes count as 0 to 1."""
    std: list[float]
    channels: int
    size: tuple[int, int] | None
    """Height and width of all images; None for photographs of any size."""
    flip: bool
    """Whether a mirrored image is one of its class."""


@dataclass(frozen=True)
class ObjectsIndex:
    """What the images of a packed detection dataset are."""

    classes: list[str]
    """Their labels are 1, 2, ..."""
    keypoints: dict[str, list[str]]
    """The names of each object's keypoints, by part."""
    masks: dict[str, bool]
    """Whether objects have masks, by part."""


KINDS: Final[dict[TaskName, type[ImagesIndex | ObjectsIndex]]] = {"classify": ImagesIndex, "detect": ObjectsIndex}


def task_of(kind: type[ImagesIndex | ObjectsIndex]) -> TaskName:
    """The task that images of this kind are for."""
    return next(task for task, other in KINDS.items() if other is kind)


@dataclass(frozen=True)
class ShardIndex:
    """What a packed dataset holds."""

    about: ImagesIndex | ObjectsIndex
    parts: dict[str, list[Shard]]
    sizes: Sizes
    """Of detection: batches hold images of like shape, which are chosen before any is read. Empty for a classifier."""

    def text(self) -> str:
        """The content of pws.json: a line per shard."""
        task = task_of(type(self.about))
        head = {"version": VERSION, "task": task, "about": asdict(self.about), "sizes": self.sizes}
        lines = [
            f" {json.dumps(name)}: [\n" + ",\n".join(f"  {json.dumps(asdict(shard))}" for shard in shards) + "\n ]"
            for name, shards in self.parts.items()
        ]
        return f'{json.dumps(head, ensure_ascii=False)[:-1]}, "parts": {{\n' + ",\n".join(lines) + "\n}}\n"

    def shards(self) -> Iterator[tuple[str, Shard]]:
        """Each shard, behind the name of its part."""
        return ((name, shard) for name, shards in self.parts.items() for shard in shards)


def parse_index(text: str, where: str) -> ShardIndex:
    """What the pws.json that stands at `where` says.

    Raises:
        PwsError: it is damaged, or of another version.
    """
    try:
        content: Any = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    version = content.get("version") if isinstance(content, dict) else None
    if isinstance(version, int) and version != VERSION:
        raise PwsError(
            f"{where} is of version {version} of the format, and this pws reads version {VERSION}. Pack the images again with "
            "this pws, or read them with the one that packed them."
        )
    try:
        about = parse_as(KINDS[content["task"]], content["about"], where)
        parts = {name: [_shard(**entry) for entry in content["parts"][name]] for name in content["parts"]}
        if version is None or not {"train"} < set(parts) <= set(PARTS) or not all(parts.values()):
            raise ValueError(f"parts {shown(list(parts))}")
        index = ShardIndex(about, parts, _sizes(content["sizes"]))
        _check_parts(index)
    except (TypeError, KeyError, ValueError) as error:
        raise PwsError(f"{where} is damaged ({shown(error)}). Copy it again, or pack the images again.") from error
    return index


def _sizes(content: dict[str, Any]) -> Sizes:
    # Not by parse_as, which takes minutes for 100,000 images.
    sizes = {name: [(height, width) for height, width in own] for name, own in content.items()}
    if not all(type(side) is int and side > 0 for own in sizes.values() for size in own for side in size):
        raise ValueError("sizes")
    return sizes


def _check_parts(index: ShardIndex) -> None:
    """Raise `ValueError` unless detection has what it needs of each part and each image."""
    if isinstance(index.about, ObjectsIndex):
        counts = {name: sum(shard.images for shard in shards) for name, shards in index.parts.items()}
        if {name: len(own) for name, own in index.sizes.items()} != counts:
            raise ValueError("sizes")
        if not set(index.about.keypoints) == set(index.about.masks) == set(counts) == {"train", "test"}:
            raise ValueError("keypoints and masks")


def _shard(*, file: str, images: int, bytes: int, sha256: str) -> Shard:
    if Path(file).name != file or not (isinstance(images, int) and isinstance(bytes, int)) or min(images, bytes) < 1:
        raise ValueError(f"shard {shown(file)}")
    return Shard(file, images, bytes, sha256)


def check_sizes(root: Path, index: ShardIndex) -> None:
    """Raise `PwsError` for the first file that is missing or not as long as it was when it was packed."""
    for part in index.parts:
        if not (root / part / LITDATA_INDEX).is_file():
            raise PwsError(f"{root / part / LITDATA_INDEX} is missing. {COPY_AGAIN}")
    for part, shard in index.shards():
        check_size(root / part / shard.file, shard)


def check_size(path: Path, shard: Shard) -> None:
    """Raise `PwsError` if a shard's file is missing or not as long as it was when it was packed."""
    if not path.is_file():
        raise PwsError(f"the shard {path} is missing. {COPY_AGAIN}")
    if path.stat().st_size != shard.bytes:
        raise PwsError(
            f"the shard {path} has {path.stat().st_size:,} bytes, and had {shard.bytes:,} when it was packed: it is cut off or "
            f"of another packing. {COPY_AGAIN}"
        )


COPY_AGAIN: Final = "Copy the packed folder again, or pack the images again (pws pack)."


def shard_of(path: Path) -> Shard:
    """What a shard's file holds: litdata's shards begin with their number of images."""
    with path.open("rb") as file:
        images = int.from_bytes(file.read(4), "little")
        file.seek(0)
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
        return Shard(path.name, images, file.tell(), digest.hexdigest())
