"""`python -m benchmarks speed`: what each method costs in time and memory."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from benchmarks import QUICK, RESULTS
from benchmarks.experiment import PROGRAM
from benchmarks.speed.run import run_suite
from benchmarks.speed.suite import SUITES, Suite, load_suite
from benchmarks.speed.tables import write_suite_report
from pws.bench.timing import ratio_text
from pws.cli.arguments import check_failures, check_folder, command_parser, parse


def run(arguments: list[str]) -> int:
    """Parse, measure what is missing, write the tables and the picture."""
    parser = command_parser(
        "speed",
        "Time methods side by side, round by round in one run, as ratios to the same network without normalization, after "
        "checking that the step is right; write NAME.json, NAME.md and NAME.png. Every case is stored when it is done: the "
        f"same command goes on where it was interrupted. The suites: {', '.join(SUITES)}.",
        f"{PROGRAM} speed resnet50",
        PROGRAM,
    )
    parser.add_argument(
        "suite", type=str, help="one of them, or a YAML file with title, rows, cases, seconds, processes"
    )
    parser.add_argument("--out", type=str, help="folder of the files; benchmarks/results/speed if left out")
    parser.add_argument("--quick", action="store_true", help="two small cases: to see that it works, not to measure")
    parsed = parse(parser, arguments)
    suite = load_suite(parsed.suite, quick=parsed.quick)
    out = Path(parsed.out or (QUICK if parsed.quick else RESULTS / "speed"))
    check_folder(out)
    console = Console()
    console.print(suite.title, highlight=False)
    with _Progress(suite, console) as progress:
        command = f"{PROGRAM} speed {parsed.suite}{' --quick' if parsed.quick else ''}"
        path = out / f"{suite.name}.json"
        result = run_suite(suite, path, command, progress.take, progress.say, progress.fail)
    if result is not None:
        files = write_suite_report(result, out / suite.name)
        console.print(f"Files: {path}, {', '.join(map(str, files))}", highlight=False, soft_wrap=True)
    check_failures("cases", progress.failures, len(suite.cases))
    return 0


class _Progress:
    """A live table with what is going on below on a terminal; a line per case elsewhere."""

    def __init__(self, suite: Suite, console: Console) -> None:
        self.suite, self.console = suite, console
        self.cases: list[Mapping[str, Any]] = []
        self.failures: dict[str, str] = {}
        self.doing = ""
        self.live = Live(console=console, refresh_per_second=2, get_renderable=self._shown)
        self.context = self.live if console.is_terminal else nullcontext()

    def __enter__(self) -> _Progress:
        self.context.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self.doing = ""
        self.context.__exit__(*raised)
        if not self.console.is_terminal:
            self.console.print(self._table())

    def say(self, text: str) -> None:
        """Take note of what is going on."""
        self.doing = text

    def fail(self, case: str, reason: str) -> None:
        """Take note of a case that could not be measured."""
        self.failures[case] = reason
        self.console.print(f"{case}: {reason}", highlight=False, markup=False, soft_wrap=True)

    def take(self, content: Mapping[str, Any]) -> None:
        """Take note of what is done."""
        self.cases = list(content["cases"])
        if not self.console.is_terminal:
            case = self.cases[-1]
            texts = ", ".join(
                f"{row} {ratio_text(cost['ratio'])}" for row, cost in case["rows"].items() if row != "none"
            )
            line = f"{len(self.cases)}/{len(self.suite.cases)}  {case['case']}: {texts}"
            self.console.print(line, highlight=False, soft_wrap=True)

    def _shown(self) -> Group:
        return Group(self._table(), Text(f"{len(self.cases)} of {len(self.suite.cases)} cases. {self.doing}"))

    def _table(self) -> Table:
        table = Table(caption="time, ratio to no normalization: median", caption_justify="left")
        table.add_column("")
        for row in self.suite.rows[1:]:
            table.add_column(row, justify="right")
        for case in self.cases:
            costs = (case["rows"].get(row) for row in self.suite.rows[1:])
            table.add_row(case["case"], *("-" if cost is None else f"{cost['ratio'][1]:.2f}" for cost in costs))
        return table
