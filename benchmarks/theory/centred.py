"""What BatchNorm's backward pass does, `E[delta] = 0`, given to Weight Normalization."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from benchmarks.experiment import PROGRAM, Say, run_experiment
from benchmarks.theory.centring import BACKWARD_CENTRED, OUTPUT_CENTRED
from benchmarks.theory.loss_plots import draw_losses
from benchmarks.theory.watched import dataset_of, train_all
from pws.bench.plotting import new_figure, save_figure
from pws.bench.result_file import Result, write_result

METHODS: Final = ("wn", BACKWARD_CENTRED, OUTPUT_CENTRED, "bn")
CHOSEN: Final = tuple((method, lr) for lr in (0.05, 0.3) for method in METHODS)
STEPS: Final = 300


def run(arguments: list[str]) -> int:
    """Measure what centring brings."""
    line = "Train wn, wn with centred output gradients and bn at learning rates 0.05 and 0.3."
    return run_experiment("centred", line, measure, arguments)


def measure(out: Path, quick: bool, say: Say) -> None:
    """Train, write centred.json and centred.png."""
    runs = [{**run.to_dict(), "losses": run.loss_curve()} for run in train_all(CHOSEN, STEPS, 10, quick, say)]
    content = {"dataset": dataset_of(quick), "runs": runs}
    draw(write_result(out / "centred.json", f"{PROGRAM} centred", content), out / "centred.png")


def draw(result: Result, path: Path) -> None:
    """Losses, a panel per learning rate."""
    rates = sorted({run["lr"] for run in result["runs"]})
    figure = new_figure(6 * len(rates), 4.4)
    for axes, lr in zip(figure.subplots(1, len(rates), squeeze=False)[0], rates, strict=True):
        draw_losses(axes, [run for run in result["runs"] if run["lr"] == lr])
    save_figure(figure, path)
