"""Detection: torchvision's losses, COCO's average precision."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor, nn

from pws._errors import PwsError
from pws.methods import Method
from pws.training.data import Parts
from pws.training.detect.metrics import build_metric, figures_by_class, figures_of, gather, known_or_none, update_metric
from pws.training.detect.samples import Target
from pws.training.module import TaskModule
from pws.training.recipe import OptimConfig
from pws.training.results import DetectionEvaluation

Batch = tuple[list[Tensor], list[Target]]


class Detector(TaskModule):
    """The sum of a detector's losses on lists of images and targets; average precision of boxes and masks on test images."""

    SCORE = "box_ap"

    def __init__(
        self,
        model: nn.Module,
        optim: OptimConfig,
        num_classes: int,
        calibration: Literal["none", "initalpha", "all"] = "none",
        method: Method | None = None,
    ) -> None:
        super().__init__(model, optim, calibration, method)
        self.num_classes = num_classes
        self.masks = any(name.endswith("mask_head") for name, _ in model.named_modules())
        self.metric = build_metric(masks=self.masks)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Boxes, labels, scores (masks, keypoints) of each image, in eval mode."""
        found: list[dict[str, Tensor]] = self.model(images)
        return found

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The detector's losses by torchvision's names."""
        found: Any = self.model(*batch)
        if not isinstance(found, dict) or not all(
            isinstance(loss, Tensor) and loss.numel() == 1 for loss in found.values()
        ):
            raise PwsError(
                "a detector must return a dict of losses in training, as torchvision's do; this model returned a "
                f"{type(found).__name__}. Its forward takes a list of images and a list of targets."
            )
        return found

    def validation_step(self, batch: Batch, _: int) -> dict[str, Any]:
        """Add a batch to the metric; returns what was found."""
        images, targets = batch
        found = self(images)
        update_metric(self.metric, found, targets)
        return {"found": found}

    def on_validation_epoch_end(self) -> None:
        """Log COCO's figures: box_ap, box_ap50, ..., mask_ap."""
        gather(self.metric)
        self.figures = figures_of(self.metric)
        self.log_dict(
            {f"{self.part}{kind}_{name}": v for kind, figures in self.figures.items() for name, v in figures.items()}
        )
        # What was found takes memory; after a test, `evaluation` asks for figures by class.
        if not self.trainer.testing:
            self.metric.reset()

    def on_test_epoch_start(self) -> None:
        """Forget the test before."""
        self.metric.reset()

    def score_on(self, batches: Iterable[Batch], images: int) -> float:
        """Average precision of boxes."""
        metric, seen = build_metric(masks=False), 0
        for inputs, targets in batches:
            update_metric(metric, self(inputs), targets)
            seen += len(inputs)
            if seen >= images:
                break
        return figures_of(metric)["box"]["ap"]

    def evaluation(self, checkpoint: str, parts: Parts) -> DetectionEvaluation:
        """COCO's figures and VOC's average precision, by class too."""
        figures = figures_by_class(self.metric, self.num_classes)
        by_class = dict(zip(parts.classes, figures, strict=True))
        voc = [of_class["voc_ap50"] for of_class in figures]
        known = [value for value in voc if value is not None]
        kinds = {kind: {name: known_or_none(v) for name, v in part.items()} for kind, part in self.figures.items()}
        return DetectionEvaluation(
            checkpoint=checkpoint,
            images=len(parts.test),
            boxes=kinds["box"],
            masks=kinds.get("mask"),
            voc_ap50=sum(known) / len(known) if known else None,
            per_class=by_class,
        )

    def score_line(self, metrics: dict[str, float]) -> str:
        """The average precision in percent."""
        kinds = ("box", "mask") if self.masks else ("box",)
        return "  ".join(f"{kind} AP {100 * metrics[f'{kind}_ap']:.1f}" for kind in kinds)
