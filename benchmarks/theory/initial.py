"""Networks at initialization, against the paper's page: average gradients, their E[delta] term, the smallest critical rate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

from torch import nn
from torch.nn import functional as F

from benchmarks.experiment import PROGRAM, Say, run_experiment
from benchmarks.theory.divergence import Network, prepare
from pws.bench.plotting import COLOURS, new_figure, save_figure
from pws.bench.result_file import rounded, write_result
from pws.diagnosis import Diagnosis, diagnose

METHODS: Final = ("none", "bn", "pws")
SEEDS: Final = 5


def run(arguments: list[str]) -> int:
    """Measure networks before training."""
    line = "Diagnose the nine-convolution network before its first step, with none, bn and pws."
    return run_experiment("initial", line, measure, arguments)


def measure(out: Path, quick: bool, say: Say) -> None:
    """Diagnose the network of widths 32 and 64 with a Kaiming head at batch 128; write initial.json and initial.png."""
    rows, drawn = [], {}
    for method in METHODS:
        found = [
            diagnose_initial(method, seed, "digits" if quick else "fashion-mnist")
            for seed in range(2 if quick else SEEDS)
        ]
        drawn[method] = found[0]
        rows.append({"method": method, **span(found)})
        row = rows[-1]
        say(
            f"{method}: ratio times n {row['ratio'][0]:.0f} to {row['ratio'][1]:.0f} in the 3x3 convolutions, E part "
            f"{row['expectation_share'][0]:.2f} to {row['expectation_share'][1]:.2f}, smallest critical LR "
            + (" to ".join(f"{lr:.3g}" for lr in row["critical_lr"]) if row["critical_lr"] else "none")
        )
    write_result(out / "initial.json", f"{PROGRAM} initial", {"rows": rows})
    _draw(drawn, out / "initial.png")


def diagnose_initial(method: str, seed: int, dataset: str = "fashion-mnist") -> Diagnosis:
    """The network before its first step, on its first batch."""
    model, loader = prepare(Network("allconv", method, 1 / 3, 128), dataset, seed)
    head = model.get_submodule("head")
    if type(head) is nn.Linear:
        nn.init.kaiming_normal_(head.weight, nonlinearity="relu")
        nn.init.zeros_(head.bias)
    return diagnose(model, next(iter(loader)), F.cross_entropy)


def span(found: list[Diagnosis]) -> dict[str, Any]:
    """Smallest and largest over the seeds, of the 3x3 convolutions behind a ReLU; of the critical rate, of all layers."""
    inner = [
        layer for d in found for layer in d.layers if layer.kernel_shape[2:] == (3, 3) and layer is not d.layers[0]
    ]
    ratios = [(layer.average_gradient_ratio or 0.0) * layer.fan_in for layer in inner]
    shares = [layer.expectation_share or 0.0 for layer in inner]
    smallest = [min(layer.critical_lr or math.inf for layer in d.layers) for d in found]
    return {
        "ratio": _span(ratios),
        "expectation_share": _span(shares),
        "critical_lr": _span(smallest) if math.isfinite(max(smallest)) else None,
    }


def _span(values: list[float]) -> list[float]:
    return [rounded(min(values)), rounded(max(values))]


def _draw(drawn: dict[str, Diagnosis], path: Path) -> None:
    figure = new_figure(11, 4.2)
    left, right = figure.subplots(1, 2)
    for method, diagnosis in drawn.items():
        x = range(1, len(diagnosis.layers) + 1)
        ratios = [(layer.average_gradient_ratio or 0.0) * layer.fan_in for layer in diagnosis.layers]
        left.plot(x, [max(r, 0.1) for r in ratios], "o-", color=COLOURS[method], label=method)
        shares = [layer.expectation_share or 0.0 for layer in diagnosis.layers]
        right.plot(x, shares, "o-", color=COLOURS[method], label=method)
    left.axhline(1, color="black", linewidth=0.8, linestyle=":")
    left.set(yscale="log", xlabel="layer", ylabel="average-gradient ratio times n (pws: 0)")
    left.set_title("How alike a filter's weights are pushed (1: independent)")
    right.set(xlabel="layer", ylabel="share of the squared average gradient", ylim=(-0.03, 1.03))
    right.set_title("Its part due to N E[delta] E[xbar] (behind a norm: 0)")
    right.legend()
    save_figure(figure, path)
