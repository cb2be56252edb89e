"""The tables of a suite, in Markdown, and the files beside its result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.speed.plots import draw_cases, draw_scaling
from pws._files import write_whole
from pws.bench.timing import ratio_text

Stored = Mapping[str, Any]
MIB = 2**20


def ratio_table(result: Stored) -> str:
    """Time of each row in each case, as a ratio to no normalization."""
    return _table(result, lambda case, row: ratio_text(case["rows"][row]["ratio"]) if row in case["rows"] else "-")


def images_table(result: Stored) -> str:
    """Images per second, median."""

    def text(case: Stored, row: str) -> str:
        measured = case["rows"].get(row)
        return f"{case['settings']['batch'] / measured['seconds']:.1f}" if measured else "-"

    return _table(result, text)


def kept_table(result: Stored) -> str:
    """MiB that a training step keeps for its backward pass."""
    return _memory_table(result, "kept")


def peak_table(result: Stored) -> str:
    """MiB that a step has at once, beyond what is there before it."""
    return _memory_table(result, "peak")


def _memory_table(result: Stored, kind: str) -> str:
    def text(case: Stored, row: str) -> str:
        found = case["rows"].get(row, {}).get(kind)
        return f"{found / MIB:.0f}" if found else "-"

    return _table(result, text)


def write_suite_report(result: Stored, stem: Path) -> list[Path]:
    """Write STEM.md and the pictures; returns what was written."""
    tables = stem.with_suffix(".md")
    write_whole(tables, markdown(result))
    written = [tables, stem.with_suffix(".png")]
    varied = [case for case in result["cases"] if case["settings"]["vary"]]
    (draw_scaling if varied else draw_cases)(result, written[1])
    return written


def markdown(result: Stored) -> str:
    """All tables, with what was measured, where and by what."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    commits = ", ".join(dict.fromkeys(case["commit"] for case in result["cases"]))
    parts = [
        f"# {result['title']}",
        f"Made by `{result['command']}`, at commit {commits}, on {result['device']}; {versions}.",
        "Time, as a ratio to the same network without normalization in the same round: median (quartiles).",
        ratio_table(result),
        "Images per second, median:",
        images_table(result),
        "Memory in MiB: the tensors kept for the backward pass.",
        kept_table(result),
        "Memory in MiB: the most that a step has at once, beyond what is there before it (parameters, momentum): gradients and "
        "kept tensors.",
        peak_table(result),
        "The optimizer's step alone on all weights, beside a copy of the same bytes (two streams); the deviation is from "
        "float64, in units of the largest change.",
        step_table(result),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def step_table(result: Stored) -> str:
    """The optimizer's step on each network's weights: time, and the share of a copy's bandwidth that it gets."""
    lines = _head(["network", "MiB", "step", "streams", "ms", "copies", "of a copy's bandwidth", "deviation"])
    for network, alone in result.get("step", {}).items():
        name = network.rpartition(":")[2]
        for step, way in alone["ways"].items():
            streams, copies = way["streams"], way["copies"][1]
            cells = [name, f"{alone['bytes'] / MIB:.0f}", step, str(streams)]
            cells += [f"{1e3 * way['seconds']:.1f}", f"{copies:.2f}", f"{streams / 2 / copies:.0%}"]
            cells += [f"{alone['deviation']:.0e}" if step.startswith("pws") else "-"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _head(titles: Iterable[str]) -> list[str]:
    titles = list(titles)
    return ["| " + " | ".join(titles) + " |", "| --- |" + " ---: |" * (len(titles) - 1)]


def _table(result: Stored, text: Callable[[Stored, str], str]) -> str:
    """Cases down, rows across: there are more cases than methods."""
    rows = result["rows"]
    lines = _head(["", *rows])
    lines += ["| " + " | ".join([case["case"], *(text(case, row) for row in rows)]) + " |" for case in result["cases"]]
    return "\n".join(lines) + "\n"
