"""What a diagnosis and a monitor cost, as ratios to the training step, measured alternately in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.experiment import PROGRAM, Say, run_experiment
from benchmarks.theory.divergence import Network, prepare, sgd_of
from pws.bench.plotting import new_figure, save_figure
from pws.bench.result_file import rounded, write_result
from pws.bench.timing import quartiles
from pws.diagnosis import Monitor, diagnose

NETWORKS: Final = (
    Network("allconv", "none", 0.3333, 128),
    Network("allconv", "bn", 0.3333, 128),
    Network("allconv", "wn", 0.3333, 128),
    Network("allconv", "pws", 0.3333, 128),
    Network("cifar-resnet18", "bn", 0.25, 64),
    Network("cifar-resnet18", "pws", 0.25, 64),
)
EVERY: Final = 50


def run(arguments: list[str]) -> int:
    """Measure what a diagnosis and a monitor cost."""
    return run_experiment("cost", "Time a diagnosis and monitored steps beside plain ones.", measure, arguments)


def measure(out: Path, quick: bool, say: Say) -> None:
    """Time diagnosis and monitored steps beside plain ones; write cost.json and cost.png."""
    rows = {}
    for network in NETWORKS[:1] if quick else NETWORKS:
        rows[str(network)] = _measure(
            network, rounds=2 if quick else 20, dataset="digits" if quick else "fashion-mnist"
        )
        row = rows[str(network)]
        say(
            f"{network}: step {1000 * row['step_s']:.0f} ms; diagnosis {row['diagnosis']:.2f} steps; a measured step costs "
            f"{row['measured_step'] - 1:.2f} more, an unmeasured {100 * (row['watched_step'] - 1):.1f} %; "
            f"Monitor(every={EVERY}) over 1000 steps {100 * row['monitor']:.1f} %"
        )
    write_result(out / "cost.json", f"{PROGRAM} cost", {"every": EVERY, "networks": rows})
    _draw(rows, out / "cost.png")


def _measure(network: Network, rounds: int, dataset: str) -> dict[str, Any]:
    """Medians over rounds in which each kind of step is timed once."""
    model, loader = prepare(network, dataset)
    images, labels = next(iter(loader))
    sgd = sgd_of(model, lr=1e-4)
    seconds: dict[str, list[float]] = {"plain": [], "diagnosis": [], "measured": [], "watched": []}
    for number in range(rounds + 1):
        found = {
            "plain": _timed(lambda: _step(model, sgd, images, labels)),
            "diagnosis": _timed(lambda: diagnose(model, (images, labels), F.cross_entropy)),
        }
        with Monitor(model, EVERY, optimizer=sgd) as monitor:
            monitor.clock = lambda: 0  # the first pass of a step is measured, the second is not
            found["measured"] = _timed(lambda: _step(model, sgd, images, labels))
            _step(
                model, sgd, images, labels
            )  # what the measurement leaves behind in caches and allocators is its own cost
            found["watched"] = _timed(lambda: _step(model, sgd, images, labels))
        if number:  # the first round warms up
            for kind, duration in found.items():
                seconds[kind].append(duration)
    return costs_of(seconds)


def costs_of(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians and quartiles of the ratios to a plain step in the same round."""
    plain = seconds["plain"]
    ratio = {k: statistics.median(a / b for a, b in zip(taken, plain, strict=True)) for k, taken in seconds.items()}
    measured = len({2**k for k in range(10)} | set(range(0, 1000, EVERY)))  # of 1000 steps
    monitor = (measured * (ratio["measured"] - 1) + (1000 - measured) * (ratio["watched"] - 1)) / 1000
    return {
        "step_s": rounded(statistics.median(plain)),
        "rounds": len(plain),
        "diagnosis": rounded(ratio["diagnosis"]),
        "measured_step": rounded(ratio["measured"]),
        "watched_step": rounded(ratio["watched"]),
        "monitor": rounded(monitor),
        "quartiles": {
            kind: quartiles(tuple(taken), tuple(plain)) for kind, taken in seconds.items() if kind != "plain"
        },
    }


def _step(model: nn.Module, sgd: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    sgd.zero_grad()
    torch.autograd.backward(F.cross_entropy(model(images), labels))
    sgd.step()


def _timed(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    figure = new_figure(10, 0.5 * len(rows) + 1.4)
    left, right = figure.subplots(1, 2, sharey=True)
    names = list(rows)[::-1]
    left.barh(names, [rows[name]["diagnosis"] for name in names], color="#2471a3")
    left.axvline(3, color="black", linestyle=":")
    left.set_xlabel("diagnosis, in training steps (goal: 3)")
    right.barh(names, [100 * rows[name]["monitor"] for name in names], color="#1e8449")
    right.axvline(5, color="black", linestyle=":")
    right.set_xlabel(f"Monitor(every={EVERY}), % of training time (goal: 5)")
    save_figure(figure, path)
