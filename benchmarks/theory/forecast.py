"""The forecast beside reality: the learning rate at which each network really diverges, found by bisection."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from scipy.stats import spearmanr
from torch.nn import functional as F

from benchmarks.experiment import PROGRAM, Say, run_experiment
from benchmarks.theory.divergence import Network, diverges, prepare, smallest_diverging_lr
from pws.bench.plotting import COLOURS, new_figure, save_figure
from pws.bench.result_file import commit, read_result, rounded, write_result
from pws.diagnosis import diagnose, forecast

CHOSEN_ON: Final = (
    Network("allconv", "none", 0.25, 64),
    Network("allconv", "bn", 0.25, 64),
    Network("allconv", "pws", 0.25, 64),
    Network("stack4", "none", 0.25, 64),
    Network("stack16", "none", 0.25, 64),
    Network("cifar-resnet18", "none", 0.125, 64),
    Network("allconv", "wn", 0.25, 64),
    Network("allconv", "gn", 0.25, 64),
    Network("allconv", "none", 0.25, 16),
    Network("allconv", "pws", 0.25, 64, {"gain": 2**0.5}),
    Network("cifar-resnet18", "bn", 0.125, 64),
    Network("cifar-resnet18", "pws", 0.125, 64),
    Network("stack16", "bn", 0.25, 64),
    Network("stack16", "pws", 0.25, 64),
    Network("allconv", "bn", 0.25, 16),
    Network("allconv", "none", 0.5, 64),
    Network("stack4", "bn", 0.25, 64),
    Network("stack4", "pws", 0.25, 64),
)
"""Networks that the forecast and its number were chosen on."""
HELD_OUT: Final = (
    Network("stack8", "none", 0.25, 64),
    Network("stack8", "gn", 0.25, 64),
    Network("stack8", "wn", 0.25, 16),
    Network("stack8", "bn", 0.25, 16),
    Network("stack8", "pws", 0.5, 64),
    Network("stack8", "ws", 0.25, 64),
)
"""Networks that had no part in choosing the forecast or its number."""
PAIRS: Final = 3
"""Pairs of batches that each forecast is made from, one after the other."""
POINT_COLOURS: Final = {**COLOURS, "gn": "#7f8c8d", "ws": "#7f8c8d"}


@dataclass
class StoredForecast:
    """What a network in the result file may hold: it is stored in two parts."""

    held_out: bool
    diverging_lr: float | None = None
    forecasts: list[float] = field(default_factory=list)
    one_step: float | None = None


def run(arguments: list[str]) -> int:
    """Measure how good the forecast is."""
    line = "Forecast the smallest diverging learning rate of 24 networks, and find it by bisection."
    return run_experiment("forecast", line, measure, arguments)


def measure(out: Path, quick: bool, say: Say) -> None:
    """Go on with what forecast.json holds; write it and forecast.png."""
    path = out / "forecast.json"
    stored: dict[str, Any] = (read_result(path, "networks", dict, StoredForecast) or {"networks": {}})["networks"]
    networks = CHOSEN_ON[:1] if quick else (*CHOSEN_ON, *HELD_OUT)
    cells = {str(n): stored[str(n)] for n in (*CHOSEN_ON, *HELD_OUT) if str(n) in stored}
    result: dict[str, Any] = {}
    for number, network in enumerate(networks, 1):
        cell = cells.setdefault(str(network), {"held_out": network in HELD_OUT})
        if "diverging_lr" not in cell:
            cell.update(_reality(network, quick))
        if "forecasts" not in cell:
            cell.update(_prediction(network, quick))
        result = {"networks": cells, "summary": summary(cells)}
        write_result(path, f"{PROGRAM} forecast", result)
        say(
            f"{number}/{len(networks)}  {network}: diverges at {_text(cell['diverging_lr'])}, forecast "
            f"{statistics.median(cell['forecasts']):.3g}, one-step critical rate {_text(cell['one_step'])}"
        )
    for row in result["summary"]:
        say(
            f"{row['what']}, {row['networks']}: rank correlation {_text(row['rank_correlation'])}, largest factor "
            f"{_text(row['largest_factor'])}"
        )
    _draw(cells, out / "forecast.png")


def _reality(network: Network, quick: bool) -> dict[str, Any]:
    setting: dict[str, Any] = {"steps": 5, "dataset": "digits"} if quick else {}
    lr, probed = smallest_diverging_lr(lambda lr: diverges(network, lr, **setting), ratio=4 if quick else 1.2)
    found = lr if 0 < lr < math.inf else None  # at no rate, or at every one
    return {"diverging_lr": found, "probed": {f"{k:.4g}": v for k, v in sorted(probed.items())}, "commit": commit()}


def _prediction(network: Network, quick: bool) -> dict[str, Any]:
    """The forecast from each pair of batches, and the smallest one-step critical rate on the first batch."""
    model, loader = prepare(network, "digits" if quick else "fashion-mnist")
    batches = list(islice(loader, 2 if quick else 2 * PAIRS))
    found = forecast(model, batches, F.cross_entropy)
    critical = diagnose(model, batches[0], F.cross_entropy).critical_lr
    return {
        "forecasts": list(found.by_pair),
        "passes": found.passes,
        "one_step": critical if math.isfinite(critical) else None,
    }


def summary(cells: dict[str, Any]) -> list[dict[str, Any]]:
    """Rank correlation and largest factor of each way to predict, over all networks, the chosen-on and the held-out ones."""
    known = [cell for cell in cells.values() if "forecasts" in cell and cell["diverging_lr"] is not None]
    groups = {
        "all networks": known,
        "networks it was chosen on": [c for c in known if not c["held_out"]],
        "held-out networks": [c for c in known if c["held_out"]],
    }
    ways: dict[str, Callable[[dict[str, Any]], float | None]] = {
        "one-step critical rate": lambda cell: cell["one_step"],
        "forecast from the first pair of batches": lambda cell: cell["forecasts"][0],
        f"median forecast of {PAIRS} pairs": lambda cell: statistics.median(cell["forecasts"]),
        f"worst forecast of {PAIRS} pairs": lambda cell: max(
            cell["forecasts"], key=lambda f: abs(math.log(f / cell["diverging_lr"]))
        ),
    }
    return [
        {"what": what, "networks": name, "count": len(group), **_agreement(group, way)}
        for what, way in ways.items()
        for name, group in groups.items()
        if len(group) > 2
    ]


def _agreement(cells: Sequence[dict[str, Any]], way: Callable[[dict[str, Any]], float | None]) -> dict[str, Any]:
    """A prediction that is missing (no step can shift a filter) ranks highest, and has no factor."""
    truth = [cell["diverging_lr"] for cell in cells]
    predicted = [way(cell) for cell in cells]
    rank = spearmanr(truth, [math.inf if p is None else p for p in predicted]).statistic
    factors = [max(p / t, t / p) for p, t in zip(predicted, truth, strict=True) if p is not None]
    return {
        "rank_correlation": rounded(float(rank)) if math.isfinite(rank) else None,
        "largest_factor": rounded(max(factors)) if factors else None,
        "missing": predicted.count(None),
    }


def _draw(cells: dict[str, Any], path: Path) -> None:
    figure = new_figure(11, 5)
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    _scatter(left, cells, "One-step critical rate at initialization", lambda cell: [cell["one_step"] or 30.0])
    _scatter(right, cells, "Forecast (bars: three pairs of batches)", lambda cell: cell["forecasts"])
    left.set_ylabel("predicted (top edge: no step can shift a filter)")
    if right.lines[1:]:
        right.legend(loc="lower right", ncols=2)
    save_figure(figure, path)


def _scatter(axes: Axes, cells: dict[str, Any], title: str, way: Callable[[dict[str, Any]], list[float]]) -> None:
    limits = (0.01, 40.0)
    axes.fill_between(limits, [x / 3 for x in limits], [x * 3 for x in limits], color="#888888", alpha=0.15)
    axes.plot(limits, limits, color="black", linewidth=0.8)
    seen = set()
    for name, cell in cells.items():
        if "forecasts" not in cell or cell["diverging_lr"] is None:
            continue
        method = name.split(",")[0].split()[1]
        values, truth = [min(max(v, 0.011), 30.0) for v in way(cell)], cell["diverging_lr"]
        marker = "D" if cell["held_out"] else "o"
        label = None if method in seen else method
        axes.plot([truth, truth], [min(values), max(values)], color=POINT_COLOURS[method], linewidth=1)
        axes.plot(
            [truth], [statistics.median(values)], marker, color=POINT_COLOURS[method], label=label, linestyle="none"
        )
        seen.add(method)
    axes.set(xscale="log", yscale="log", xlim=limits, ylim=limits, title=title)
    axes.set_xlabel("learning rate that really diverges within 200 steps (diamonds: held out)")


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
