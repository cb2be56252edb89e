"""`pws bench speed`: what a model costs with its norms, without them and with pws."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from pws._errors import PwsError
from pws.bench.model_speed import WITHOUT, compare_model
from pws.bench.result_file import write_result
from pws.bench.timing import ratio_text
from pws.cli.arguments import add_force, check_counts, check_free, command_parser, parse

MIB: Final = 2**20
LONGEST: Final = 3600


def run(arguments: list[str]) -> int:
    """Parse, time, print, write."""
    parser = command_parser(
        "bench speed",
        "Time a training step (SGD with momentum) and inference of a model on random images: as it is, without its norms, and "
        "converted to pws. Times are ratios to the model without norms in the same round: median and quartiles.",
        "pws bench speed --model timm:resnet18 --batch-size 8 --image-size 128",
    )
    parser.add_argument(
        "--model", type=str, required=True, help="torchvision:NAME, timm:NAME or package.module:factory"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="images of a step")
    parser.add_argument("--image-size", type=int, default=128, help="pixels per side")
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing, for each of the two")
    parser.add_argument("--out", type=str, help="folder of speed.json, which holds the numbers")
    add_force(parser)
    parsed = parse(parser, arguments)
    check_counts(parsed)
    if not 0 < parsed.seconds <= LONGEST:
        raise PwsError(f"--seconds must be positive, and at most {LONGEST}; got {parsed.seconds}.")
    path = None if parsed.out is None else Path(parsed.out) / "speed.json"
    if path is not None:
        check_free(path, force=parsed.force)
    sizes = parsed.batch_size, parsed.image_size
    with Console(stderr=True).status("") as status:
        tasks = compare_model(parsed.model, *sizes, parsed.seconds, lambda doing: status.update(doing))
    console = Console()
    console.print(_table(parsed, tasks))
    if path is not None:
        command = f"pws bench speed --model {parsed.model} --batch-size {sizes[0]} --image-size {sizes[1]}"
        write_result(path, command, {"tasks": tasks})
        console.print(f"Files: {path}", highlight=False, soft_wrap=True)
    return 0


def _table(parsed: Any, tasks: dict[str, dict[str, dict[str, Any]]]) -> Table:
    title = f"{parsed.model}, batch {parsed.batch_size}, {parsed.image_size} pixels"
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.caption = (
        f"time: ratio to the model {WITHOUT}, median (quartiles). kept: tensors kept for the backward pass. peak: the most "
        "that a step needs beside parameters and momentum."
    )
    for column in ("", "time", "ms", "kept, MiB", "peak, MiB"):
        table.add_column(column, justify="right" if column else "left")
    for task, rows in tasks.items():
        table.add_section()
        table.add_row(f"[bold]{task}[/bold]")
        for row, cost in rows.items():
            sizes = (f"{cost[kind] / MIB:.0f}" for kind in ("kept", "peak"))
            table.add_row(row, ratio_text(cost["ratio"]), f"{1e3 * cost['seconds']:.1f}", *sizes)
    return table
