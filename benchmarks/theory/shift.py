"""The filters' means take over none and wn, not bn and pws."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from benchmarks.experiment import PROGRAM, Say, run_experiment
from benchmarks.theory.loss_plots import RUN_COLOURS, draw_losses
from benchmarks.theory.watched import dataset_of, shift_shares, train_all
from pws.bench.plotting import new_figure, save_figure
from pws.bench.result_file import Result, write_result

CHOSEN: Final = tuple((method, 0.3) for method in ("none", "wn", "bn", "pws"))
STEPS: Final = 200


def run(arguments: list[str]) -> int:
    """Measure the shift share over training."""
    return run_experiment("shift", "Train none, wn, bn and pws at learning rate 0.3.", measure, arguments)


def measure(out: Path, quick: bool, say: Say) -> None:
    """Train, write shift.json and shift.png."""
    runs = [
        {**run.to_dict(), "losses": run.loss_curve(), "shift_share": list(shift_shares(run.diagnoses))}
        for run in train_all(CHOSEN, STEPS, 10, quick, say)
    ]
    content = {"dataset": dataset_of(quick), "runs": runs}
    draw(write_result(out / "shift.json", f"{PROGRAM} shift", content), out / "shift.png")


def draw(result: Result, path: Path) -> None:
    """Loss and shift share over the steps."""
    figure = new_figure(12, 4.4)
    left, right = figure.subplots(1, 2)
    draw_losses(left, result["runs"])
    for run in result["runs"]:
        steps, shares = zip(*run["shift_share"], strict=True)
        right.plot(steps, shares, "o-", color=RUN_COLOURS[run["method"]], label=run["method"], markersize=3)
    right.set_ylim(-0.03, 1)
    right.set_xscale("symlog", linthresh=1)
    right.set_xlabel("step")
    right.set_xlim(-0.2, None)
    right.set_ylabel("shift share, mean of the inner layers")
    right.set_title("How much of the outputs' variance the filters' means make")
    right.legend()
    save_figure(figure, path)
