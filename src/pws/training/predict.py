"""What a run's network says of image files: a picture and a JSON file of each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from PIL import Image
from torch import Tensor

from pws._errors import PwsError
from pws._files import write_whole, written_whole
from pws.training.detect.objects import SeenObject, found_objects
from pws.training.detect.pictures import draw_objects
from pws.training.images import read_image
from pws.training.pictures import draw_classes
from pws.training.trained import SCORE, Trained, TrainedClassifier, trained_of

TOP: Final = 5
"""Classes that a classifier's prediction names."""
SIDE: Final = 640
"""Pixels of a picture's longer side at least."""


class Prediction(Protocol):
    """What is said of an image."""

    def record(self) -> dict[str, Any]:
        """For a JSON file."""

    def picture(self, image: Tensor) -> Image.Image:
        """The image, with it."""

    def line(self) -> str:
        """In a few words."""


@dataclass(frozen=True)
class ClassPrediction:
    """The likeliest classes."""

    labels: list[int]
    classes: list[tuple[str, float]]
    """Names and probabilities."""

    def record(self) -> dict[str, Any]:
        """Label, name and probability of each."""
        found = zip(self.labels, self.classes, strict=True)
        return {"classes": [{"label": label, "class": name, "probability": p} for label, (name, p) in found]}

    def picture(self, image: Tensor) -> Image.Image:
        """With a bar for each."""
        return draw_classes(image, self.classes)

    def line(self) -> str:
        """The likeliest."""
        return f"{self.classes[0][0]} ({100 * self.classes[0][1]:.1f} %)"


@dataclass(frozen=True)
class DetectionPrediction:
    """Objects."""

    objects: list[SeenObject]
    size: tuple[int, int]
    """Height and width of the image, in whose pixels the objects are."""

    def record(self) -> dict[str, Any]:
        """Of each object."""
        return {"height": self.size[0], "width": self.size[1], "objects": [one.record() for one in self.objects]}

    def picture(self, image: Tensor) -> Image.Image:
        """With boxes, masks and keypoints; small images are enlarged."""
        return draw_objects(image, self.objects, max(SIDE, *self.size))

    def line(self) -> str:
        """How many of each class."""
        names = [one.name for one in self.objects]
        counts = [f"{names.count(name)} {name}" for name in dict.fromkeys(names)]
        return ", ".join(counts) or "no object"


@dataclass(frozen=True)
class Predicted:
    """A file that was looked at, and the two that were written."""

    file: Path
    picture: Path
    record: dict[str, Any]
    """What the JSON file holds."""
    line: str


def predict(
    run: Path,
    files: Sequence[Path],
    out: Path,
    checkpoint: str = "best",
    score: float | None = None,
) -> Iterator[Predicted]:
    """Write OUT/NAME.png and OUT/NAME.json for each image; what stands there is replaced.

    Args:
        run: the folder of the run.
        files: images; `check_files` says which may be given.
        out: the folder to write to.
        checkpoint: "best", "last" or the path of a file.
        score: (detectors) objects below it are left out; 0.5 if left out.

    Raises:
        PwsError: a file is no image, or the run can't be had. Then nothing is written.
    """
    check_files(files, out)
    trained = trained_of(run, checkpoint, device="cuda" if torch.cuda.is_available() else "cpu")
    said = predictor(trained, score)
    for file in files:
        image = read_image(file, upright=True)
        prediction = said(image)
        picture, written = outputs_of(file, out)
        record = {"file": str(file), "checkpoint": str(trained.checkpoint), **prediction.record()}
        out.mkdir(parents=True, exist_ok=True)
        with written_whole(picture) as partial:
            prediction.picture(image).save(partial)
        write_whole(written, json.dumps(record, indent=2, allow_nan=False) + "\n")
        yield Predicted(file, picture, record, prediction.line())


def outputs_of(file: Path, out: Path) -> tuple[Path, Path]:
    """The picture and the JSON file of an image."""
    return out / f"{file.stem}.png", out / f"{file.stem}.json"


def check_files(files: Sequence[Path], out: Path) -> None:
    """Raise `PwsError` unless these are images whose predictions have a file each, none of them an image itself."""
    names: dict[str, Path] = {}
    for file in files:
        if file.is_dir():
            raise PwsError(f"{file} is a folder, and pws predict takes files. Give {file}/*.")
        if not file.exists():
            raise PwsError(f"the image {file} does not exist.")
        read_image(file, upright=True)
        other = names.setdefault(file.stem, file)
        if other is not file:
            raise PwsError(
                f"{other} and {file} would both be written to {outputs_of(file, out)[0]}: files are told apart by their names "
                "without suffix. Predict them one after the other, each with an --out of its own."
            )
    given = {file.resolve() for file in files}
    for path in (path for file in files for path in outputs_of(file, out)):
        if path.resolve() in given:
            raise PwsError(f"{path} would replace the image itself. Name another folder with --out.")


def predictor(trained: Trained, score: float | None = None) -> Callable[[Tensor], Prediction]:
    """What tells of an image `(3, H, W)` uint8 what the run's network finds.

    Raises:
        PwsError: a score for a classifier, or none in [0, 1].
    """
    if isinstance(trained, TrainedClassifier):
        if score is not None:
            raise PwsError(f"--score is for detectors, and {trained.recipe.name} is a classifier. Leave it out.")
        return lambda image: _classified(trained, image)
    if score is not None and not 0 <= score <= 1:
        raise PwsError(f"--score must be in [0, 1]; got {score:g}.")
    return lambda image: _detected(trained, image, SCORE if score is None else score)


def _classified(trained: TrainedClassifier, image: Tensor) -> Prediction:
    (probabilities,) = trained.probabilities(trained.prepare(image)[None])
    top = probabilities.topk(min(TOP, len(trained.classes)))
    labels = top.indices.tolist()
    return ClassPrediction(
        labels, [(trained.classes[label], p) for label, p in zip(labels, top.values.tolist(), strict=True)]
    )


@torch.inference_mode()
def _detected(trained: Trained, image: Tensor, score: float) -> Prediction:
    (found,) = trained([image])
    return DetectionPrediction(found_objects(found, trained.classes, score), (image.shape[1], image.shape[2]))
