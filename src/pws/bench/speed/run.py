"""A suite from the first case to the last, each stored when it is done."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pws.bench.result import commit, read_result, write_result
from pws.bench.speed.measure import measure_case, rows_of
from pws.bench.speed.step_alone import step_alone
from pws.bench.speed.suite import Suite

Stored = dict[str, Any]


def run_suite(
    suite: Suite, path: Path, command: str, listen: Callable[[Stored], None], say: Callable[[str], None]
) -> Stored:
    """Measure what `path` does not hold yet; returns the content of `path`.

    Args:
        suite: rows and cases.
        path: the result file. Cases in it with the suite's settings and rows are kept.
        command: what the file says that made it.
        listen: called with the content after each case.
        say: called with what is going on.

    Raises:
        PwsError: the step deviates from float64.
    """
    old: Stored = read_result(path, "cases") or {"cases": []}
    content: Stored = {
        "suite": suite.name,
        "title": suite.title,
        "rows": suite.rows,
        "step": {},
        "cases": [],
    }
    for model, width in dict.fromkeys((case.model, case.width) for case in suite.cases):
        name = f"{model} x {width:g}"
        say(f"{name}: the step alone")
        kept = old.get("step", {}).get(name)
        content["step"][name] = kept or step_alone(model, width, 30 if suite.seconds > 5 else 5)
    for case in suite.cases:
        settings, wanted = asdict(case), rows_of(case, suite.rows)
        kept = next((c for c in old["cases"] if c["settings"] == settings and list(c["rows"]) == wanted), None)
        rows = {} if kept else measure_case(case, suite, say)
        measured = {row: asdict(m) for row, m in rows.items()}
        content["cases"].append(kept or {"case": str(case), "settings": settings, "commit": commit(), "rows": measured})
        partial = path.with_suffix(".partial")
        write_result(partial, command, content)
        partial.replace(path)
        listen(content)
    result: Stored = json.loads(path.read_text())
    return result
