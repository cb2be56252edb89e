"""`pws demo`: see the collapse and the cure in a minute, without any argument or download."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from io import StringIO
from pathlib import Path

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from pws._errors import PwsError
from pws._files import write_whole, written_whole
from pws.cli.arguments import add_force, check_free, command_parser, parse
from pws.demo import LEARNING_RATES, DemoResult, DemoRun, all_runs, draw, sentences, train_run
from pws.optim.bound import STEP_BOUND
from pws.training.quiet import quiet_lightning

FILES = ("demo.png", "demo.json", "demo.txt")


def run(arguments: list[str]) -> int:
    """Parse, train all runs, tell the story."""
    parser = command_parser(
        "demo",
        "Train a network of nine convolutions on scikit-learn's digits, with five methods at three learning rates. Print which "
        "of them collapse, and why. It takes about a minute, and needs no data and no GPU.",
        "pws demo --out demo",
    )
    parser.add_argument(
        "--out", type=str, default="demo", help="folder for demo.png, demo.json, demo.txt and the reports"
    )
    add_force(parser)
    parser.add_argument("--epochs", type=int, default=5, help="epochs per run, of 22 steps each")
    parsed = parse(parser, arguments)
    if not 1 <= parsed.epochs <= 1000:
        raise PwsError(f"--epochs must be at least 1, and at most 1000; got {parsed.epochs}.")
    quiet_lightning()
    check_free(*(Path(parsed.out) / name for name in FILES), force=parsed.force)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # the numbers depend on how sums are split: the same on every machine that has two cores
    try:
        _demo(Path(parsed.out), parsed.epochs)
    finally:
        torch.set_num_threads(threads)
    return 0


def _demo(out: Path, epochs: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    started = time.perf_counter()
    results, reports, seconds = _train_all(console, epochs, started, out)
    story = sentences(results)
    with written_whole(out / "demo.png") as partial:
        draw(results, partial)
    rows = [{**asdict(run), **asdict(result)} for run, result in results.items()]
    content = {"epochs": epochs, "runs": rows, "story": story, "train_seconds": seconds}
    write_whole(out / "demo.json", json.dumps(content, indent=2) + "\n")
    for number, sentence in enumerate(story, 1):
        console.print(f"\n{number}. {sentence}", highlight=False)
    plain = Console(file=StringIO(), width=100)
    plain.print(_table({run: str(result) for run, result in results.items()}))
    for number, sentence in enumerate(story, 1):
        plain.print(f"{number}. {sentence}")
    write_whole(out / "demo.txt", plain.file.getvalue())  # type: ignore[attr-defined]
    console.print("\nWhy each collapse happened, layer by layer (open in a browser):")
    for run, report in reports.items():
        console.print(f"  {run.row} at {run.lr:g}: {report}", highlight=False, soft_wrap=True)
    console.print(f"Files: {', '.join(str(out / name) for name in FILES)}", highlight=False, soft_wrap=True)


def _train_all(
    console: Console, epochs: int, started: float, out: Path
) -> tuple[dict[DemoRun, DemoResult], dict[DemoRun, Path], float]:
    results: dict[DemoRun, DemoResult] = {}
    reports: dict[DemoRun, Path] = {}
    shown: dict[DemoRun, str] = {}
    with Live(_table(shown), console=console, refresh_per_second=4) as live:
        for run in all_runs():

            def progress(done: int, steps: int, run: DemoRun = run) -> None:
                shown[run] = f"[dim]step {done}/{steps}[/dim]"
                live.update(_table(shown, time.perf_counter() - started))

            result, monitor = train_run(run, epochs, progress)
            results[run] = result
            shown[run] = f"[{'bold red' if result.collapsed else 'green'}]{result}[/]"
            if result.collapsed and monitor.shown is not None:
                report = out / f"{run.row}-{run.lr:g}.html".replace(", ", "-").replace(" ", "-")
                title = f"pws demo: {run.row} at learning rate {run.lr:g}"
                reports[run] = monitor.shown.html(report, history=monitor.history, title=title)
                shown[run] = f"[link={report.absolute().as_uri()}]{shown[run]}[/link]"
            live.update(_table(shown, time.perf_counter() - started))
    return results, reports, round(time.perf_counter() - started, 1)


def _table(shown: dict[DemoRun, str], seconds: float | None = None) -> Table:
    clock = "" if seconds is None else f", {seconds:.0f} s"
    table = Table(title=f"Test accuracy on real digits, 9 convolutions, batch 64{clock}", title_justify="left")
    table.caption = (
        "NaN: the loss went non-finite at that step. stuck: no better than a guess from that step on. "
        f"pws: each layer's step is at most {STEP_BOUND:g} long. Last row: this bound without pws."
    )
    table.caption_justify = "left"
    table.add_column("method")
    for name, rate in LEARNING_RATES.items():
        table.add_column(f"{name} LR {rate:g}", justify="right", min_width=16)
    rows = {run.row: [shown.get(c, "") for c in all_runs() if c.row == run.row] for run in all_runs()}
    for row, texts in rows.items():
        table.add_row(f"[bold]{row}[/bold]" if row == "pws" else row, *texts)
    return table
