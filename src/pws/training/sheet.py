"""A sheet of the test images that a network does worst on."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pws._files import written_whole
from pws.training.data import ImageData, RecipeData
from pws.training.detect.data import DetectionData
from pws.training.detect.metrics import ignored_in
from pws.training.detect.objects import found_objects, true_objects
from pws.training.detect.pictures import draw_objects
from pws.training.detect.samples import Target
from pws.training.detect.voc_ap import OVERLAP, ImageBoxes, hits_of, objects_of
from pws.training.pictures import scaled_to, shortened

COUNT: Final = 24
COLUMNS: Final = 4
SIDE: Final = 420
"""Pixels of a test image's longer side on the sheet."""
DPI: Final = 100
SCORE: Final = 0.5
Judged = tuple[tuple[float, ...], Any]
"""How bad the outputs of an image are, and what is drawn of them."""


@dataclass(frozen=True)
class Shown:
    """A test image on the sheet."""

    badness: tuple[float, ...]
    picture: Image.Image
    text: str


class WorstImages(Callback, ABC):
    """Keeps the worst images of a test, in a process of its own."""

    WORST: ClassVar[str]
    """How they are told."""

    def __init__(self, parts: Any) -> None:
        self.parts = parts
        self.shown: list[Shown] = []
        self.seen = 0

    @abstractmethod
    def judged(self, outputs: Any, batch: Any) -> Iterator[Judged]:
        """How bad the outputs are of each image of a batch, and what `draw` needs of them."""

    @abstractmethod
    def draw(self, number: int, found: Any) -> tuple[Image.Image, str]:
        """Test image `number` and what is said of it, below its name."""

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: int
    ) -> None:
        """Keep the worst so far; of equal ones the first."""
        for badness, found in self.judged(outputs, batch):
            if len(self.shown) < COUNT or badness > self.shown[-1].badness:
                picture, text = self.draw(self.seen, found)
                name = shortened(self.parts.test.name(self.seen), SIDE // 10)
                kept = [*self.shown, Shown(badness, picture, f"{name}\n{text}")]
                self.shown = sorted(kept, key=lambda one: one.badness, reverse=True)[:COUNT]
            self.seen += 1


class LargestLoss(WorstImages):
    """A classifier's."""

    WORST = "the largest loss"

    def judged(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Iterator[Judged]:
        """By cross-entropy."""
        labels = batch[1]
        losses = F.cross_entropy(outputs, labels, reduction="none").tolist()
        for found in zip(outputs.softmax(1).cpu(), labels.tolist(), losses, strict=True):
            yield (found[-1],), found

    def draw(self, number: int, found: tuple[Tensor, int, float]) -> tuple[Image.Image, str]:
        """With its true class and the likeliest one."""
        probabilities, label, loss = found
        pixels, _ = self.parts.test.get([number])
        names, best = self.parts.classes, int(probabilities.argmax())
        said = f"loss {loss:.2f}, true {shortened(names[label])} ({100 * probabilities[label]:.1f} %)"
        found_else = f"found {shortened(names[best])} ({100 * probabilities[best]:.1f} %)" if best != label else ""
        return scaled_to(_as_bytes(pixels[0]), SIDE), f"{said}\n{found_else}"


def _as_bytes(pixels: Tensor) -> Tensor:
    """Pixels of any range and number of channels as an image."""
    if pixels.dtype != torch.uint8:
        low, high = pixels.amin(), pixels.amax()
        pixels = ((pixels - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8)
    return pixels if len(pixels) in (1, 3) else pixels[:1]


class LowestF1(WorstImages):
    """A detector's."""

    WORST = f"the lowest F1 at score {SCORE} and overlap {OVERLAP}; green: what is there"

    def judged(self, outputs: dict[str, Any], batch: Any) -> Iterator[Judged]:
        """By the harmonic mean of precision and recall of boxes; of equal ones by the number of mistakes."""
        for found, target in zip(outputs["found"], batch[1], strict=True):
            right, false, missed = counts(found, target)
            yield (-_f1(right, false + missed), false + missed), (found, target, right, false, missed)

    def draw(self, number: int, found: Any) -> tuple[Image.Image, str]:
        """With what is there and what was found."""
        prediction, target, right, false, missed = found
        names = self.parts.classes
        objects = found_objects(prediction, names, SCORE) + true_objects(target, names)
        image, _ = self.parts.test.get(number)
        said = f"F1 {_f1(right, false + missed):.2f}: {right} right, {false} false, {missed} missed"
        return draw_objects(image.as_subclass(Tensor), objects, SIDE), said


def _f1(right: int, wrong: int) -> float:
    """1 where nothing is there and nothing was found."""
    return 2 * right / (2 * right + wrong) if wrong else 1.0


def counts(found: dict[str, Tensor], target: Target) -> tuple[int, int, int]:
    """Detections of an image that are right, those that are wrong, and objects that are missed."""
    kept = found["scores"] >= SCORE
    predicted = [found[name][kept] for name in ("boxes", "scores", "labels")]
    image = ImageBoxes(*(t.cpu() for t in (*predicted, target["boxes"], target["labels"], ignored_in(target))))
    right = false = objects = 0
    for label in set(image.labels.tolist()) | set(image.true_labels.tolist()):
        _, hits, count = hits_of(image, label)
        right += int((hits & count).sum())
        false += int((~hits & count).sum())
        objects += objects_of(image, label)
    return right, false, objects - right


def worst_images(data: RecipeData) -> WorstImages:
    """What keeps the worst test images of these data."""
    if isinstance(data, DetectionData):
        return LowestF1(data.splits)
    assert isinstance(data, ImageData)
    return LargestLoss(data.splits)


def write_sheet(worst: WorstImages, path: Path) -> None:
    """Write the images, the worst first, as PNG."""
    rows = math.ceil(len(worst.shown) / COLUMNS)
    figure = Figure(figsize=(COLUMNS * 4.4, rows * 5.0 + 0.8), layout="constrained", dpi=DPI)
    FigureCanvasAgg(figure)
    figure.suptitle(f"The {len(worst.shown)} worst of {worst.seen:,} test images: {worst.WORST}", fontsize=18)
    for axes in figure.subplots(rows, COLUMNS, squeeze=False).flat:
        axes.set_axis_off()
    for axes, shown in zip(figure.axes, worst.shown, strict=False):
        axes.imshow(shown.picture)
        axes.set_title(shown.text, fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        figure.savefig(partial, format="png")
