"""The pictures of the experiments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from pws.bench.figure import new_figure, save_figure
from pws.bench.theory import BACKWARD_CENTRED, OUTPUT_CENTRED, Run

COLOURS = {
    **{"none": "#c0392b", "wn": "#e67e22", "bn": "#2471a3", "pws": "#1e8449"},
    **{"nf": "#8e44ad", "gn": "#17a2b8", "ws": "#b7950b", "pws-paper": "#82c91e", "formula": "#82c91e"},
    **{"pws layers": "#7dcea0", "pws in backward": "#145a32", "pws reference": "#a2d9ce"},
    **{BACKWARD_CENTRED: "#7f8c8d", OUTPUT_CENTRED: "#8e44ad"},
}


def draw_shift(runs: Sequence[Run], path: Path) -> None:
    """Loss, and the shift share of the middle layer that rose most in any run, over the steps."""
    figure = new_figure(12, 4.4)
    left, right = figure.subplots(1, 2)
    for run in runs:
        _losses(left, run)
        steps = [d.step or 0 for d in run.diagnoses]
        # The first layer sees one image channel and the head a few features: both have large shares from the start.
        shares = [_mean([layer.shift_share for layer in d.layers[1:-1]]) for d in run.diagnoses]
        right.plot(steps, shares, "o-", color=COLOURS[run.method], label=run.method, markersize=3)
    _loss_axes(left, runs)
    right.set_ylim(-0.03, 1)
    right.set_xscale("symlog", linthresh=1)
    right.set_xlabel("step")
    right.set_xlim(-0.2, None)
    right.set_ylabel("shift share, mean of the inner layers")
    right.set_title("How much of the outputs' variance the filters' means make")
    right.legend()
    save_figure(figure, path)


def draw_centred(runs: Sequence[Run], path: Path) -> None:
    """Losses of wn, wn with centred output gradients and bn, a panel a learning rate."""
    rates = sorted({run.lr for run in runs})
    figure = new_figure(6 * len(rates), 4.4)
    for axes, lr in zip(figure.subplots(1, len(rates), squeeze=False)[0], rates, strict=True):
        chosen = [run for run in runs if run.lr == lr]
        for run in chosen:
            _losses(axes, run)
        _loss_axes(axes, chosen)
    save_figure(figure, path)


def draw_depth(runs: Sequence[Run], path: Path) -> None:
    """Variance of each layer's output before the first step and after five, a panel a method."""
    figure = new_figure(3.4 * len(runs), 4)
    for axes, run in zip(figure.subplots(1, len(runs), sharey=True), runs, strict=True):
        for diagnosis, style in ((run.diagnoses[0], "o--"), (run.diagnoses[-1], "o-")):
            values = [layer.output.variance for layer in diagnosis.layers]
            shown = [v if math.isfinite(v) and v > 0 else math.nan for v in values]
            label = f"step {diagnosis.step}" + ("" if all(map(math.isfinite, values)) else " (overflows)")
            axes.plot(range(1, len(shown) + 1), shown, style, color=COLOURS[run.method], label=label, markersize=4)
        axes.set_yscale("log")
        axes.set_title(f"{run.method}, LR {run.lr:g}")
        axes.set_xlabel("layer")
        axes.legend()
    figure.axes[0].set_ylabel("variance of the layer's output")
    save_figure(figure, path)


def _losses(axes: Axes, run: Run) -> None:
    values = [math.nan if loss is None else loss for loss in run.losses]
    end = next((i for i, loss in enumerate(run.losses) if loss is None), None)
    label = run.method if end is None else f"{run.method} (NaN at step {end})"
    axes.plot(_smoothed(values), color=COLOURS[run.method], label=label, linewidth=1.2)
    if end is not None and end > 0:
        axes.plot([end - 1], [min(values[end - 1], 1e3)], "x", color=COLOURS[run.method], markersize=9)


def _loss_axes(axes: Axes, runs: Sequence[Run]) -> None:
    axes.set_ylim(0, 4)
    axes.axhline(math.log(10), color="black", linewidth=0.8, linestyle=":")
    axes.text(1, math.log(10) + 0.03, "a guess ", fontsize=8, ha="right", transform=axes.get_yaxis_transform())
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, running mean of 10")
    axes.set_title(f"Learning rate {runs[0].lr:g}, momentum 0.9, batch 64")
    axes.legend()


def _smoothed(values: Sequence[float], over: int = 10) -> list[float]:
    return [sum(values[max(0, i + 1 - over) : i + 1]) / min(i + 1, over) for i in range(len(values))]


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
