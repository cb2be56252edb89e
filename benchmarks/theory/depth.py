"""The variance along the depth, before the first step and after five."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

from benchmarks.experiment import PROGRAM, Say, run_experiment
from benchmarks.theory.loss_plots import RUN_COLOURS
from benchmarks.theory.watched import dataset_of, finite_variances, train_all
from pws.bench.plotting import new_figure, save_figure
from pws.bench.result_file import Result, write_result

CHOSEN: Final = tuple((method, 0.3) for method in ("none", "wn", "bn", "pws"))
STEPS: Final = 6


def run(arguments: list[str]) -> int:
    """Measure the variance along the depth."""
    line = "Train none, wn, bn and pws for six steps at learning rate 0.3."
    return run_experiment("depth", line, measure, arguments)


def measure(out: Path, quick: bool, say: Say) -> None:
    """Train, write depth.json and depth.png."""
    runs = []
    for run in train_all(CHOSEN, STEPS, 5, quick, say):
        measured = {f"{d.step or 0}": finite_variances(d) for d in (run.diagnoses[0], run.diagnoses[-1])}
        runs.append(
            {**run.to_dict(), "layers": [layer.name for layer in run.diagnoses[0].layers], "variances": measured}
        )
    content = {"dataset": dataset_of(quick), "runs": runs}
    draw(write_result(out / "depth.json", f"{PROGRAM} depth", content), out / "depth.png")


def draw(result: Result, path: Path) -> None:
    """Variance of each layer's output before the first step and after five, a panel per method."""
    runs = result["runs"]
    figure = new_figure(3.4 * len(runs), 4)
    for axes, run in zip(figure.subplots(1, len(runs), sharey=True), runs, strict=True):
        for (step, variances), style in zip(run["variances"].items(), ("o--", "o-"), strict=False):
            shown = [variance or math.nan for variance in variances]
            label = f"step {step}" + (" (overflows)" if None in variances else "")
            colour = RUN_COLOURS[run["method"]]
            axes.plot(range(1, len(shown) + 1), shown, style, color=colour, label=label, markersize=4)
        axes.set_yscale("log")
        axes.set_title(f"{run['method']}, LR {run['lr']:g}")
        axes.set_xlabel("layer")
        axes.legend()
    figure.axes[0].set_ylabel("variance of the layer's output")
    save_figure(figure, path)
