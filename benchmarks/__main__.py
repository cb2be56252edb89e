"""`python -m benchmarks`: one line per command, which has options of its own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Final

from pws._errors import UnknownNameError
from pws.cli.exit_code import exit_code_of

COMMANDS: Final = {
    "initial": ("theory.initial", "average gradients before training, beside the paper's (seconds)"),
    "shift": ("theory.shift", "shift share and loss over training: none, wn, bn, pws (a minute)"),
    "centred": ("theory.centred", "wn, wn with centred output gradients, bn (two minutes)"),
    "depth": ("theory.depth", "variance along the depth before and after five steps (seconds)"),
    "forecast": ("theory.forecast", "forecast and real smallest diverging learning rates (an hour)"),
    "cost": ("theory.cost", "what a diagnosis and a monitor cost, in training steps (two minutes)"),
    "private": ("theory.private", "average gradients of single images, and of noise (a minute)"),
    "accuracy": (
        "accuracy.command",
        "a grid of methods, learning rates and batch sizes (5 to 75 minutes on two cores)",
    ),
    "speed": ("speed.command", "a suite of methods side by side, time and memory (minutes to half an hour)"),
    "convert": ("convert.command", "161 models of torchvision and timm converted and checked (half an hour)"),
    "stream": ("stream", "an epoch of 100,000 streamed images: speed, memory, order (two minutes)"),
    "scale": ("scale", "memory per process of a sharded ResNet-50, bytes exchanged per step (a minute)"),
    "samplers": (
        "samplers",
        "gradients per sample in Opacus: its sampler, ours, functorch; ghost clipping (ten minutes)",
    ),
    "warm-start": ("convert.warm_start", "trained networks converted, then fine-tuned (a quarter of an hour)"),
    "make-trainable": ("convert.make_trainable", "trained networks made trainable for Opacus (ten minutes)"),
    "tables": ("tables", "the tables of README.md and docs filled from the result files (seconds)"),
}
"""Name to module and line."""
GOES_ON: Final = ("forecast", "accuracy", "speed", "convert", "warm-start", "samplers")
USAGE: Final = "\n".join(
    [
        "usage: python -m benchmarks NAME [options]     (python -m benchmarks NAME --help tells the options)",
        "",
        *(f"  {name:15}{line}" for name, (_, line) in COMMANDS.items()),
        "",
        f"Each writes its result to benchmarks/results. {', '.join(GOES_ON)} store each part when it is done,",
        "and go on where they were interrupted when the same command is given again.",
        "",
        "Example: python -m benchmarks accuracy collapse --jobs 2",
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    goes_on = "; the same command goes on" if arguments and arguments[0] in GOES_ON else ""
    return exit_code_of(lambda: _run(arguments), "benchmarks", goes_on)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        raise UnknownNameError("benchmark", name, COMMANDS)
    code: int = importlib.import_module(f"benchmarks.{COMMANDS[name][0]}").run(arguments[1:])
    return code


if __name__ == "__main__":
    sys.exit(main())
