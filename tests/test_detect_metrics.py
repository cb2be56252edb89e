"""A detector's figures: those of COCO's own evaluation, run directly on JSON made by hand."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as rle
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pws.training.detect.detector import Detector
from pws.training.detect.metrics import FIGURES, build_metric, figures_by_class, figures_of, update_metric
from pws.training.detect.samples import Target
from pws.training.quiet import bare_trainer
from pws.training.recipe import OptimConfig
from pws.training.results import DetectionEvaluation

SIDE = 256
CLASSES = 4
"""The last of them is in no image; the third is found, and never there."""
Prediction = dict[str, Tensor]


def masks_of(boxes: Tensor) -> Tensor:
    """An ellipse in each box."""
    rows, columns = torch.arange(SIDE)[:, None] + 0.5, torch.arange(SIDE)[None] + 0.5
    left, top, right, bottom = (side[:, None, None] for side in boxes.unbind(1))
    across, down = (columns - (left + right) / 2) / (right - left), (rows - (top + bottom) / 2) / (bottom - top)
    return across**2 + down**2 <= 0.25


def random_boxes(rng: np.random.Generator, count: int) -> Tensor:
    sides = np.exp(rng.uniform(np.log(16), np.log(200), (count, 2)))
    corner = rng.uniform(0, SIDE - sides)
    return torch.tensor(np.hstack([corner, corner + sides]), dtype=torch.float32).reshape(-1, 4)


def scene(rng: np.random.Generator, number: int) -> tuple[Prediction, Target]:
    """Objects of two classes, some of them crowds, and what a poor detector finds of them."""
    there = 0 if number % 7 == 0 else int(rng.integers(1, 7))
    boxes = random_boxes(rng, there)
    labels = torch.tensor(rng.integers(1, 3, there), dtype=torch.int64)
    near = boxes + torch.tensor(rng.normal(0, 2.5, boxes.shape), dtype=torch.float32)
    found = torch.cat([near, near[: there // 2] + 1, random_boxes(rng, int(rng.integers(0, 4)))])
    found = found[:0] if number % 5 == 0 else found
    kinds = torch.cat([labels, labels[: there // 2], torch.tensor(rng.integers(1, 4, 4))])[: len(found)]
    scores = torch.tensor(rng.random(len(found)), dtype=torch.float32)
    masks = masks_of(boxes)
    target = {
        "boxes": boxes,
        "labels": labels,
        "iscrowd": torch.tensor(rng.random(there) < 0.2).long(),
        "area": masks.flatten(1).sum(1).float(),
        "masks": masks.to(torch.uint8),
    }
    return {"boxes": found, "labels": kinds, "scores": scores, "masks": masks_of(found)[:, None].float()}, target


def encoded(mask: Tensor) -> dict[str, Any]:
    code = rle.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {"size": code["size"], "counts": code["counts"].decode()}


def xywh(box: Tensor) -> list[float]:
    left, top, right, bottom = box.double().tolist()
    return [left, top, right - left, bottom - top]


def coco_files(scenes: list[tuple[Prediction, Target]], folder: Path) -> tuple[Path, Path]:
    """COCO's annotation file and its result file."""
    objects, results = [], []
    for number, (found, target) in enumerate(scenes, start=1):
        for k in range(len(target["boxes"])):
            kept = {name: value[k].item() for name, value in target.items() if value[k].dim() == 0}
            objects.append(
                {
                    "id": len(objects) + 1,
                    "image_id": number,
                    "category_id": kept["labels"],
                    "bbox": xywh(target["boxes"][k]),
                }
                | {"iscrowd": kept["iscrowd"], "area": kept["area"], "segmentation": encoded(target["masks"][k])}
            )
        for k in range(len(found["boxes"])):
            mask = encoded(found["masks"][k, 0] > 0.5)
            results.append(
                {"image_id": number, "category_id": int(found["labels"][k]), "bbox": xywh(found["boxes"][k])}
                | {"score": float(found["scores"][k]), "segmentation": mask}
            )
    images = [{"id": n, "width": SIDE, "height": SIDE} for n in range(1, len(scenes) + 1)]
    categories = [{"id": label, "name": str(label)} for label in range(1, CLASSES + 1)]
    truth, found_file = folder / "truth.json", folder / "found.json"
    truth.write_text(json.dumps({"images": images, "annotations": objects, "categories": categories}))
    found_file.write_text(json.dumps(results))
    return truth, found_file


def coco_figures(files: tuple[Path, Path], kind: str, label: int | None = None) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(files[0]))
        # COCO takes the box's area where there is a box, and means that of the mask.
        other = {"bbox": "segmentation", "segm": "bbox"}[kind]
        found = [{k: v for k, v in one.items() if k != other} for one in json.loads(files[1].read_text())]
        evaluation = COCOeval_faster(truth, truth.loadRes(found), kind)
        if label is not None:
            evaluation.params.catIds = [label]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(figure) for figure in evaluation.stats[:12]]


@pytest.fixture(scope="module")
def scenes() -> list[tuple[Prediction, Target]]:
    rng = np.random.default_rng(0)
    return [scene(rng, number) for number in range(40)]


@pytest.fixture(scope="module")
def files(scenes: list[tuple[Prediction, Target]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return coco_files(scenes, tmp_path_factory.mktemp("coco"))


@pytest.mark.parametrize("masks", [True, False])
def test_figures_are_those_of_coco(
    masks: bool, scenes: list[tuple[Prediction, Target]], files: tuple[Path, Path]
) -> None:
    metric = build_metric(masks=masks)
    for start in range(0, len(scenes), 3):
        part = scenes[start : start + 3]
        update_metric(metric, [found for found, _ in part], [target for _, target in part])
    figures, by_class = figures_of(metric), figures_by_class(metric, CLASSES)
    assert set(figures) == ({"box", "mask"} if masks else {"box"})
    for kind, theirs in (("box", "bbox"), ("mask", "segm"))[: len(figures)]:
        expected = coco_figures(files, theirs)
        assert all(0.02 < figure < 0.98 for figure in expected), expected
        assert [figures[kind][name] for name in FIGURES.values()] == pytest.approx(expected, abs=1e-6), kind
        for label in (1, 2):
            assert by_class[label - 1][f"{kind}_ap"] == pytest.approx(coco_figures(files, theirs, label)[0], abs=1e-6)
        assert by_class[2][f"{kind}_ap"] is by_class[3][f"{kind}_ap"] is None
    assert [part["voc_ap50"] is None for part in by_class] == [False, False, True, True]


class Known(nn.Module):
    """A detector that finds what it was told to find in image 0, 1, ...: an image's pixels hold its number."""

    def __init__(self, found: list[Prediction], *, masks: bool) -> None:
        super().__init__()
        self.found = found
        if masks:
            self.mask_head = nn.Identity()

    def forward(self, images: list[Tensor]) -> list[Prediction]:
        return [self.found[round(float(image[0, 0, 0]))] for image in images]


@dataclass
class Parts:
    test: list[Target]
    classes: list[str]
    train: tuple[()] = ()
    validation: None = None


def evaluated(found: list[Prediction], targets: list[Target], classes: list[str]) -> DetectionEvaluation:
    masks = any("masks" in one for one in found)
    module = Detector(Known(found, masks=masks), OptimConfig(), len(classes))
    images = [torch.full((3, SIDE, SIDE), float(number)) for number in range(len(targets))]
    batches = [(images[n : n + 2], targets[n : n + 2]) for n in range(0, len(targets), 2)]
    bare_trainer(accelerator="cpu").test(module, DataLoader(batches, batch_size=None), verbose=False)
    return module.evaluation("best.ckpt", Parts(targets, classes))


def one(box: list[float] | None, label: int = 1, **more: Any) -> Target:
    boxes = torch.tensor([box] if box else []).reshape(-1, 4)
    count = len(boxes)
    return {
        "boxes": boxes,
        "labels": torch.full((count,), label),
        "iscrowd": torch.zeros(count, dtype=torch.int64),
        "area": (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
        **{name: torch.tensor([value] * count) for name, value in more.items()},
    }


def hit(box: list[float] | None, label: int = 1, score: float = 0.9) -> Prediction:
    target = one(box, label)
    return {
        **{name: target[name] for name in ("boxes", "labels")},
        "scores": torch.full((len(target["boxes"]),), score),
    }


SMALL, BIG = [10.0, 10.0, 30.0, 30.0], [10.0, 10.0, 150.0, 150.0]


def test_what_no_object_is_there_for_is_none() -> None:
    """Small objects of the first class alone: found whole in one of two images; the second image has none."""
    found = [hit(SMALL), hit(None), hit(SMALL, score=0.1)]
    evaluation = evaluated(found, [one(SMALL), one(None), one([60.0, 60.0, 80.0, 80.0])], ["a", "b"])
    half = pytest.approx(51 / 101)  # COCO's 101 recalls, of which 51 are at most a half
    assert evaluation.boxes == {
        **dict.fromkeys(("ap", "ap50", "ap75", "ap_small"), half),
        **dict.fromkeys(("ar1", "ar10", "ar100", "ar_small"), pytest.approx(0.5)),
        **dict.fromkeys(("ap_medium", "ap_large", "ar_medium", "ar_large"), None),
    }
    assert (evaluation.masks, evaluation.images, evaluation.voc_ap50) == (None, 3, pytest.approx(0.5))
    assert evaluation.per_class == {
        "a": {"box_ap": half, "voc_ap50": pytest.approx(0.5)},
        "b": {"box_ap": None, "voc_ap50": None},
    }
    json.dumps(asdict(evaluation), allow_nan=False)


@pytest.mark.parametrize("box", [SMALL, None])
def test_no_object_in_any_image(box: list[float] | None) -> None:
    evaluation = evaluated([hit(box)], [one(None)], ["a"])
    assert set(evaluation.boxes.values()) == {None}
    assert evaluation.voc_ap50 is None
    assert evaluation.per_class == {"a": {"box_ap": None, "voc_ap50": None}}


def test_nothing_found() -> None:
    evaluation = evaluated([hit(None)], [one(BIG)], ["a"])
    assert (evaluation.boxes["ap"], evaluation.boxes["ap_large"], evaluation.boxes["ar100"]) == (0, 0, 0)
    assert evaluation.boxes["ap_small"] is None
    assert evaluation.voc_ap50 == 0


@pytest.mark.parametrize("difficult", [True, False])
def test_a_difficult_object_is_neither_hit_nor_miss(difficult: bool) -> None:
    """Never found by overlap, it costs half of the recall unless it is difficult."""
    targets = [one(BIG, difficult=False), one(SMALL, difficult=difficult)]
    evaluation = evaluated([hit(BIG), hit(None)], targets, ["a"])
    assert evaluation.boxes["ap"] == pytest.approx(1 if difficult else 51 / 101)
    assert evaluation.voc_ap50 == pytest.approx(1 if difficult else 0.5)


@pytest.mark.parametrize("difficult", [True, False])
def test_what_is_found_of_a_difficult_object_is_no_false_alarm(difficult: bool) -> None:
    """The detection of the highest score is inside a large object, and overlaps it by less than any threshold."""
    inside = [20.0, 20.0, 140.0, 120.0]
    targets = [one(BIG, difficult=difficult), one(BIG, difficult=False)]
    evaluation = evaluated([hit(inside), hit(BIG, score=0.5)], targets, ["a"])
    assert evaluation.boxes["ap75"] == pytest.approx(1 if difficult else 51 / 101 / 2)
    assert evaluation.voc_ap50 == pytest.approx(1)
