"""Which gain should be the default? The published constant against the variance-preserving one, with and without a
bounded step, at three learning rates; the grid of paper.md section 6. Writes gain.json beside this file after every
cell, and goes on where it stopped. `python benchmarks/gain.py`, about a quarter of an hour on 2 cores."""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from pws.gain import PAPER_GAIN
from pws.training import load_recipe, train
from pws.training.module import NonFiniteLossError
from pws.training.quiet import quiet_lightning

RESULT = Path(__file__).with_suffix(".json")
ROWS: dict[str, tuple[str, ...]] = {
    "bn": ("--model.method=bn",),
    "pws, gain sqrt(2)": (f"--model.gain={PAPER_GAIN}",),
    "pws, gain relu": ("--model.gain=relu",),
    "pws, gain sqrt(2), step bounded": (f"--model.gain={PAPER_GAIN}", "bounded"),
    "pws, gain relu, step bounded": ("--model.gain=relu", "bounded"),
}
SETTING = (
    *("--model.width=0.3333", "--data.train_images=12800", "--trainer.epochs=2", "--trainer.max_steps=150"),
    *("--trainer.accelerator=cpu", "--trainer.devices=1"),
)
LEARNING_RATES, SEEDS, STEP_BOUND = (0.01, 0.1, 0.5), (0, 1), 0.1


def run_cell(flags: tuple[str, ...], lr: float, seed: int) -> dict[str, Any]:
    """Test accuracy in %, or the step at which the loss went non-finite."""
    bound = STEP_BOUND if "bounded" in flags else "null"
    overrides = (*(flag for flag in flags if flag != "bounded"), f"--optim.step_bound={bound}")
    recipe = load_recipe("fashion-mnist-allconv-pws", *SETTING, *overrides, f"--optim.lr={lr}", f"--seed={seed}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            summary = train(recipe, Path(folder) / "run", quiet=True)
        except NonFiniteLossError as error:
            return {"nan_at_step": error.step}
    assert summary.accuracy is not None
    return {"accuracy": round(100 * summary.accuracy, 2), "device": summary.device, "versions": summary.versions}


def markdown(cells: dict[str, Any]) -> str:
    """The table of the documentation: means over the seeds."""
    lines = [
        "| | " + " | ".join(f"LR {lr:g}" for lr in LEARNING_RATES) + " |",
        "| --- |" + " ---: |" * len(LEARNING_RATES),
    ]
    for row in ROWS:
        found = [[cells[f"{row} | {lr:g} | {seed}"] for seed in SEEDS] for lr in LEARNING_RATES]
        lines.append(f"| {row} | " + " | ".join(_text(outcomes) for outcomes in found) + " |")
    return "\n".join(lines)


def _text(outcomes: list[dict[str, Any]]) -> str:
    if any("nan_at_step" in o for o in outcomes):
        return ", ".join(f"nan@{o['nan_at_step']}" if "nan_at_step" in o else f"{o['accuracy']:.1f}" for o in outcomes)
    return f"{statistics.mean(o['accuracy'] for o in outcomes):.1f}"


def main() -> None:
    """Run what is missing, print the table."""
    quiet_lightning()
    cells: dict[str, Any] = json.loads(RESULT.read_text())["cells"] if RESULT.exists() else {}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    grid = [(row, lr, seed) for seed in SEEDS for row in ROWS for lr in LEARNING_RATES]
    for row, lr, seed in grid:
        key = f"{row} | {lr:g} | {seed}"
        if key not in cells:
            cells[key] = {**run_cell(ROWS[row], lr, seed), "commit": commit}
            RESULT.write_text(json.dumps({"key": "row | learning rate | seed", "cells": cells}, indent=1) + "\n")
            print(f"{len(cells)}/{len(grid)}  {key}: {cells[key].get('accuracy', cells[key])}", flush=True)
    print(markdown(cells))


if __name__ == "__main__":
    main()
