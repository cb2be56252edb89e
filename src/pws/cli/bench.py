"""`pws bench`: the experiments behind the theory, each with a result file and a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from pws._errors import UnknownNameError
from pws.bench.cost import run_cost
from pws.bench.experiments import run_centred, run_depth, run_shift
from pws.bench.forecasts import run_forecast
from pws.bench.initial import run_initial
from pws.bench.result import check_own
from pws.bench.warm_start import run_warm_start
from pws.cli import accuracy, conversion, speed, tables
from pws.cli.arguments import check_folder, command_parser, parse
from pws.training.quiet import quiet_lightning

Bench = Callable[[Path, bool, Callable[[str], None]], dict[str, Any]]
BENCHES: Final[dict[str, tuple[Bench, str]]] = {
    "initial": (run_initial, "networks before training against the paper: average gradients and their parts (seconds)"),
    "shift": (run_shift, "shift share and loss over training: none, wn, bn, pws (a minute)"),
    "centred": (run_centred, "wn, wn with centred output gradients, bn (two minutes)"),
    "depth": (run_depth, "variance along the depth before and after five steps (seconds)"),
    "forecast": (
        run_forecast,
        "predicted beside real smallest diverging learning rates (an hour; goes on where it stopped)",
    ),
    "cost": (run_cost, "what a diagnosis and a monitor cost, in training steps (two minutes)"),
    "warm-start": (
        run_warm_start,
        "trained networks converted: accuracy before, after, and fine-tuned (a quarter of an hour; goes on where it stopped)",
    ),
}
COMMANDS: Final = {"accuracy": accuracy.run, "convert": conversion.run, "speed": speed.run, "tables": tables.run}
"""Those with options of their own."""


def run(arguments: list[str]) -> int:
    """Parse, measure, write."""
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    lines = "; ".join(f"{name}: {line}" for name, (_, line) in BENCHES.items())
    parser = command_parser(
        "bench",
        f"Measure on Fashion-MNIST and write NAME.json and NAME.png. {lines}. With a --help of their own: accuracy GRID (all "
        "methods side by side), speed SUITE (what they cost), convert (real models converted), tables (those of documents).",
        "pws bench shift",
    )
    parser.add_argument("name", type=str, help=f"one of {', '.join(BENCHES)}")
    parser.add_argument(
        "--out", type=str, help="folder of the result file and the picture; benchmarks, or benchmarks/quick"
    )
    parser.add_argument(
        "--quick", action="store_true", help="digits and few steps: to see that it works, not to measure"
    )
    parsed = parse(parser, arguments)
    if parsed.name not in BENCHES:
        raise UnknownNameError("bench", parsed.name, BENCHES)
    quiet_lightning()
    console, out = Console(), Path(parsed.out or ("benchmarks/quick" if parsed.quick else "benchmarks"))
    check_folder(out)
    check_own(out / f"{parsed.name}.json", f"pws bench {parsed.name}")
    BENCHES[parsed.name][0](
        out, parsed.quick, lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)
    )
    console.print(f"Files: {out / parsed.name}.json, {out / parsed.name}.png", highlight=False, soft_wrap=True)
    return 0
