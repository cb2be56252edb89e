"""The theory's experiments from runs to files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pws.bench.pictures import draw_centred, draw_depth, draw_shift
from pws.bench.result import write_result
from pws.bench.theory import CENTRED_RUNS, DEPTH_RUNS, SHIFT_RUNS, Run, train_watched

Say = Callable[[str], None]


def run_shift(out: Path, quick: bool, say: Say) -> dict[str, Any]:
    """Shift over training."""
    return _experiment("shift", SHIFT_RUNS, 200, draw_shift, out, quick, say)


def run_centred(out: Path, quick: bool, say: Say) -> dict[str, Any]:
    """BatchNorm's missing piece in Weight Normalization."""
    return _experiment("centred", CENTRED_RUNS, 300, draw_centred, out, quick, say)


def run_depth(out: Path, quick: bool, say: Say) -> dict[str, Any]:
    """Variance along the depth, before and after five steps."""
    return _experiment("depth", DEPTH_RUNS, 6, draw_depth, out, quick, say, every=5)


def _experiment(
    name: str,
    cells: Sequence[tuple[str, float]],
    steps: int,
    draw: Callable[[Sequence[Run], Path], None],
    out: Path,
    quick: bool,
    say: Say,
    every: int = 10,
) -> dict[str, Any]:
    dataset, steps = ("digits", min(steps, 8)) if quick else ("fashion-mnist", steps)
    runs = []
    for method, lr in cells:
        runs.append(train_watched(method, lr, steps, every, dataset))
        last = [loss for loss in runs[-1].losses[-20:] if loss is not None]
        ended = "non-finite" if runs[-1].losses[-1] is None else f"loss {sum(last) / len(last):.3g}"
        say(f"{method}, LR {lr:g}: {ended} after {len(runs[-1].losses)} steps. {runs[-1].verdict}")
    result = {"dataset": dataset, "steps": steps, "runs": [run.to_dict() for run in runs]}
    write_result(out / f"{name}.json", f"pws bench {name}", result)
    draw(runs, out / f"{name}.png")
    return result
