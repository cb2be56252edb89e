"""Loss curves, as the theory's pictures share them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from matplotlib.axes import Axes

from benchmarks.theory.centring import BACKWARD_CENTRED, OUTPUT_CENTRED
from benchmarks.theory.watched import SMOOTHED_OVER
from pws.bench.plotting import COLOURS

RUN_COLOURS: Final = {**COLOURS, BACKWARD_CENTRED: "#7f8c8d", OUTPUT_CENTRED: "#8e44ad"}
StoredRun = Mapping[str, Any]
"""`WatchedRun.to_dict`, with its curves."""


def draw_losses(axes: Axes, runs: Sequence[StoredRun]) -> None:
    """The losses of runs of one learning rate by step, with a cross where one went non-finite."""
    for run in runs:
        steps, losses = zip(*run["losses"], strict=True)
        end, colour = run["non_finite_step"], RUN_COLOURS[run["method"]]
        label = run["method"] if end is None else f"{run['method']} (NaN at step {end})"
        axes.plot(steps, losses, color=colour, label=label, linewidth=1.2)
        if end is not None:
            axes.plot([steps[-1]], [min(losses[-1], 1e3)], "x", color=colour, markersize=9)
    axes.set_ylim(0, 4)
    axes.axhline(math.log(10), color="black", linewidth=0.8, linestyle=":")
    axes.text(1, math.log(10) + 0.03, "a guess ", fontsize=8, ha="right", transform=axes.get_yaxis_transform())
    axes.set_xlabel("step")
    axes.set_ylabel(f"training loss, running mean of {SMOOTHED_OVER}")
    axes.set_title(f"Learning rate {runs[0]['lr']:g}, momentum 0.9, batch 64")
    axes.legend()
