"""The tables of a suite, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pws.bench.speed.pictures import draw_cases, draw_scaling, quartiles

Stored = Mapping[str, Any]
MIB = 2**20


def ratio_text(case: Stored, row: str) -> str:
    """Median and quartiles."""
    if row not in case["rows"]:
        return "-"
    low, middle, high = quartiles(case, row)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def ratio_table(result: Stored) -> str:
    """Time of each row in each case, as a ratio to no normalization."""
    return _table(result, ratio_text)


def images_table(result: Stored) -> str:
    """Images a second, median."""

    def text(case: Stored, row: str) -> str:
        measured = case["rows"].get(row)
        return f"{case['settings']['batch'] / statistics.median(measured['seconds']):.1f}" if measured else "-"

    return _table(result, text)


def memory_table(result: Stored) -> str:
    """MiB of a training step."""

    def text(case: Stored, row: str) -> str:
        measured = case["rows"].get(row)
        return f"{measured['memory'] / MIB:.0f}" if measured and measured["memory"] else "-"

    return _table(result, text)


def write_report(result: Stored, stem: Path) -> list[Path]:
    """Write STEM.md and the pictures; returns what was written."""
    tables = stem.with_suffix(".md")
    tables.write_text(markdown(result))
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
        "Images a second, median:",
        images_table(result),
        "Memory in MiB: on a GPU the peak of a step, on a CPU the tensors kept for the backward pass.",
        memory_table(result),
        "The standardization of all kernels alone, beside a copy of the same bytes; the deviation is from float64, in units of "
        "the largest entry.",
        standardization_table(result),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def standardization_table(result: Stored) -> str:
    """Each network's kernels through each backend."""
    lines = _head(["network", "MiB", "copy, ms", "backend", "forward", "backward", "deviation"])
    for network, alone in result["standardization"].items():
        seconds = alone["seconds"]
        for backend, deviation in alone["deviation"].items():
            cells = [_beside(seconds[f"{backend} {way}"], seconds["copy"]) for way in ("forward", "backward")]
            copied = f"{1e3 * statistics.median(seconds['copy']):.1f}"
            cells = [
                network.rpartition(":")[2],
                f"{alone['bytes'] / MIB:.0f}",
                copied,
                backend,
                *cells,
                f"{deviation:.0e}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _beside(seconds: Sequence[float], copied: Sequence[float]) -> str:
    ratio = statistics.median(a / b for a, b in zip(seconds, copied, strict=True))
    return f"{1e3 * statistics.median(seconds):.1f} ms, {ratio:.2f} copies"


def _head(titles: Iterable[str]) -> list[str]:
    titles = list(titles)
    return ["| " + " | ".join(titles) + " |", "| --- |" + " ---: |" * (len(titles) - 1)]


def _table(result: Stored, text: Callable[[Stored, str], str]) -> str:
    """Cases down, rows across: there are more cases than methods."""
    rows = result["rows"]
    lines = _head(["", *rows])
    lines += ["| " + " | ".join([case["case"], *(text(case, row) for row in rows)]) + " |" for case in result["cases"]]
    return "\n".join(lines) + "\n"
