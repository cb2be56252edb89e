"""VOC's average precision: hand-computed numbers, and an independent implementation on random boxes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pws.training.detect.voc_ap import ImageBoxes, voc_ap50

Box = tuple[float, float, float, float]
NEAR: Box = (0, 0, 10, 10)
FAR: Box = (50, 50, 60, 60)
ELSEWHERE: Box = (80, 0, 90, 10)
HALF: Box = (0, 0, 10, 20)
"""Overlaps `NEAR` by exactly a half."""


def image(found: list[tuple[Box, float, int]], there: list[tuple[Box, int, bool]]) -> ImageBoxes:
    """Detections (box, score, label) and objects (box, label, ignored)."""
    return ImageBoxes(
        torch.tensor([box for box, _, _ in found]).reshape(-1, 4),
        torch.tensor([score for _, score, _ in found]),
        torch.tensor([label for _, _, label in found], dtype=torch.int64),
        torch.tensor([box for box, _, _ in there]).reshape(-1, 4),
        torch.tensor([label for _, label, _ in there], dtype=torch.int64),
        torch.tensor([ignored for _, _, ignored in there], dtype=torch.bool),
    )


@pytest.mark.parametrize(
    ("found", "there", "expected"),
    [
        ([], [(NEAR, 1, False)], 0.0),
        ([], [], None),
        ([(NEAR, 0.9, 1)], [], None),
        ([(NEAR, 0.9, 1)], [(NEAR, 2, False)], None),
        ([(NEAR, 0.9, 2)], [(NEAR, 1, False)], 0.0),
        ([(NEAR, 0.9, 1)], [(NEAR, 1, True)], None),
        ([(NEAR, 0.9, 1)], [(NEAR, 1, False)], 1.0),
        ([(HALF, 0.9, 1)], [(NEAR, 1, False)], 1.0),
        ([((0, 0, 10, 20.1), 0.9, 1)], [(NEAR, 1, False)], 0.0),
        # A duplicate behind the hit: the recall is complete before it counts.
        ([(NEAR, 0.9, 1), (NEAR, 0.8, 1)], [(NEAR, 1, False)], 1.0),
        # Hit, duplicate, hit: precision 1 to recall 1/2, then 2/3.
        ([(NEAR, 0.9, 1), (NEAR, 0.8, 1), (FAR, 0.7, 1)], [(NEAR, 1, False), (FAR, 1, False)], 0.5 + 0.5 * 2 / 3),
        # Miss, hit; the other object is never found: precision 1/2 to recall 1/2, then 0.
        ([(ELSEWHERE, 0.9, 1), (NEAR, 0.8, 1)], [(NEAR, 1, False), (FAR, 1, False)], 0.25),
        # The same in another order of the list: only scores count.
        ([(NEAR, 0.8, 1), (ELSEWHERE, 0.9, 1)], [(NEAR, 1, False), (FAR, 1, False)], 0.25),
        # Two detections of a difficult object count as nothing, and it is not missed either.
        ([(FAR, 0.9, 1), (FAR, 0.8, 1), (NEAR, 0.7, 1)], [(NEAR, 1, False), (FAR, 1, True)], 1.0),
        # Hit, miss, miss, hit of three objects: 1/3 * 1 + 1/3 * 2/4.
        (
            [(NEAR, 0.9, 1), (ELSEWHERE, 0.8, 1), (ELSEWHERE, 0.7, 1), (FAR, 0.6, 1)],
            [(NEAR, 1, False), (FAR, 1, False), ((20, 20, 30, 30), 1, False)],
            1 / 3 + 1 / 6,
        ),
    ],
)
def test_by_hand(
    found: list[tuple[Box, float, int]], there: list[tuple[Box, int, bool]], expected: float | None
) -> None:
    assert voc_ap50([image(found, there)], 1) == (expected if expected is None else pytest.approx(expected, abs=1e-12))


def test_objects_and_detections_of_several_images_share_one_curve() -> None:
    images = [
        image([(NEAR, 0.5, 1)], [(NEAR, 1, False)]),
        image([(NEAR, 0.9, 1)], []),
        image([], [(FAR, 1, False)]),
        image([], []),
    ]
    assert voc_ap50(images, 1) == pytest.approx(0.25)


def reference(images: list[ImageBoxes], label: int) -> float:
    """VOC's development kit, loop by loop: detections of all images by score, then the area below the curve."""
    detections = [
        (float(score), number, box.tolist())
        for number, one in enumerate(images)
        for box, score, kind in zip(one.boxes, one.scores, one.labels, strict=True)
        if kind == label
    ]
    objects = [
        [
            [box.tolist(), bool(ignored), False]
            for box, kind, ignored in zip(one.true_boxes, one.true_labels, one.ignored, strict=True)
            if kind == label
        ]
        for one in images
    ]
    total = sum(not ignored for part in objects for _, ignored, _ in part)
    hits, misses, recalls, precisions = 0, 0, [0.0], [0.0]
    for _, number, box in sorted(detections, reverse=True):
        overlaps = [overlap(box, other[0]) for other in objects[number]]
        best = int(np.argmax(overlaps)) if overlaps else 0
        if overlaps and overlaps[best] >= 0.5:
            there = objects[number][best]
            if there[1]:
                continue
            hits, misses, there[2] = hits + (not there[2]), misses + there[2], True
        else:
            misses += 1
        recalls.append(hits / total)
        precisions.append(hits / (hits + misses))
    recalls, precisions = [*recalls, 1.0], [*precisions, 0.0]
    for place in range(len(precisions) - 2, -1, -1):
        precisions[place] = max(precisions[place], precisions[place + 1])
    return sum((recalls[k] - recalls[k - 1]) * precisions[k] for k in range(1, len(recalls)))


def overlap(first: list[float], second: list[float]) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return width * height / (sum(both) - width * height)


@pytest.mark.parametrize("seed", range(5))
def test_as_the_development_kit_on_random_boxes(seed: int) -> None:
    rng = np.random.default_rng(seed)

    def boxes(count: int) -> torch.Tensor:
        corner = rng.uniform(0, 30, (count, 2))
        return torch.tensor(np.hstack([corner, corner + rng.uniform(8, 20, (count, 2))]))

    images = []
    for _ in range(30):
        found, there = int(rng.integers(0, 12)), int(rng.integers(0, 6))
        moved, kinds = boxes(there), torch.tensor(rng.integers(1, 3, there))
        moved = torch.cat([moved + torch.tensor(rng.normal(0, 1, (there, 4))), boxes(found)])
        images.append(
            ImageBoxes(
                moved,
                torch.tensor(rng.permutation(len(moved)) / len(moved) + rng.uniform(0, 1e-3, len(moved))),
                torch.cat([kinds, torch.tensor(rng.integers(1, 3, found))]),
                moved[:there] + torch.tensor(rng.normal(0, 1, (there, 4))),
                kinds,
                torch.tensor(rng.random(there) < 0.3),
            )
        )
    for label in (1, 2):
        expected = reference(images, label)
        assert 0.05 < expected < 0.95
        assert voc_ap50(images, label) == pytest.approx(expected, abs=1e-9)
