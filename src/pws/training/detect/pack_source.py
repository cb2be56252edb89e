"""What `pws pack` reads for a detector: COCO's JSON beside folders of images."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from pws.training.detect.coco import CocoImages
from pws.training.detect.datasets import load_detection_splits
from pws.training.detect.stream import write_objects
from pws.training.pack_sources import Entry, FileEntry, Source, mixed
from pws.training.recipe import DataConfig
from pws.training.shards import ObjectsIndex, Sizes


def is_coco(root: Path) -> bool:
    """Whether a folder holds JSON files where COCO has its annotations."""
    return any((root / "annotations").glob("*.json"))


def coco_source(root: Path, *, keypoints: bool) -> Source:
    """The images of a folder that data.name coco reads, or coco-keypoints.

    Raises:
        PwsError: as `load_detection_splits`.
    """
    name = "coco-keypoints" if keypoints else "coco"
    splits = load_detection_splits(DataConfig(name=name, root=str(root), validation=0), seed=0)
    found = {"train": splits.train, "test": splits.test}
    keypoints_of = {part: images.keypoint_names for part, images in found.items()}
    about = ObjectsIndex(splits.classes, keypoints_of, {part: images.has_masks for part, images in found.items()})
    digest, total = sha256(repr(about).encode()), 0
    parts: dict[str, Sequence[Entry]] = {}
    sizes: Sizes = {}
    for part, images in found.items():
        assert isinstance(images, CocoImages)
        used = mixed(images.images) if part == "train" else images.images
        sizes[part] = [(image.height, image.width) for image in used]
        entries = []
        for image in used:
            path, objects = images.folder / image.name, write_objects(image.objects)
            length = path.stat().st_size
            total += length + len(objects)
            digest.update(f"{part}/{image.name} {image.height} {image.width} {length}\n".encode() + objects)
            entries.append(FileEntry(path, objects, image.name, None))
        parts[part] = entries
    return Source(str(root), about, parts, total, digest.hexdigest(), sizes)
