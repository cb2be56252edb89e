"""A suite from the first case to the last, each stored when it is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.speed.step_alone import step_alone
from benchmarks.speed.steps import build_step
from benchmarks.speed.suite import Case, Suite, rows_of
from pws.bench.processes import TaskError
from pws.bench.result_file import Result, commit, read_result, write_result
from pws.bench.timing import Cost, costs, measure

Stored = dict[str, Any]


@dataclass
class StoredCase:
    """What the tables need of a case in a result file."""

    case: str
    settings: dict[str, Any]
    commit: str
    rows: dict[str, Cost]


def run_suite(
    suite: Suite,
    path: Path,
    command: str,
    listen: Callable[[Stored], None],
    say: Callable[[str], None],
    fail: Callable[[str, str], None],
) -> Result | None:
    """Measure what `path` does not hold yet; returns the content of `path`, None if no case was measured.

    Args:
        suite: rows and cases.
        path: the result file. Cases in it with the suite's settings and rows are kept.
        command: what the file says that made it.
        listen: called with the content after each case.
        say: called with what is going on.
        fail: called with a case that could not be measured and the reason, such as that a row's process died.

    Raises:
        PwsError: the step deviates from float64.
    """
    old: Stored = read_result(path, "cases", list, StoredCase) or {"cases": []}
    content: Stored = {"suite": suite.name, "title": suite.title, "rows": suite.rows, "step": {}, "cases": []}
    for model, width in dict.fromkeys((case.model, case.width) for case in suite.cases):
        name = f"{model} x {width:g}"
        say(f"{name}: the step alone")
        kept = old.get("step", {}).get(name)
        content["step"][name] = kept or step_alone(model, width, 30 if suite.seconds > 5 else 5)
    result: Result | None = None
    for case in suite.cases:
        try:
            content["cases"].append(_kept(old, case, suite) or _measured(case, suite, say))
        except TaskError as error:
            fail(str(case), str(error))
            continue
        result = write_result(path, command, content)
        listen(content)
    return result


def _kept(old: Stored, case: Case, suite: Suite) -> Stored | None:
    settings, wanted = asdict(case), rows_of(case, suite.rows)
    return next((c for c in old["cases"] if c["settings"] == settings and list(c["rows"]) == wanted), None)


def _measured(case: Case, suite: Suite, say: Callable[[str], None]) -> Stored:
    builders = {row: partial(build_step, case, row) for row in rows_of(case, suite.rows)}
    timings = measure(str(case), builders, suite.seconds, suite.processes, say)
    rows = {row: asdict(cost) for row, cost in costs(timings, "none").items()}
    return {"case": str(case), "settings": asdict(case), "commit": commit(), "rows": rows}
