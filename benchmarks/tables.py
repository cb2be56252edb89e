"""`python -m benchmarks tables`: tables in documents, filled from result files.

A document says where a table goes: of which result, which of its tables if not the main one, and which rows if not all:

    <!-- table accuracy/collapse: bn; pws -->
    <!-- end -->
    <!-- table accuracy/rates range -->
    <!-- end -->
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from benchmarks import RESULTS, ROOT
from benchmarks.convert.make_trainable import trainable_table
from benchmarks.convert.tables import conversions_summary, conversions_table
from benchmarks.convert.warm_start import warm_start_table
from benchmarks.experiment import PROGRAM
from benchmarks.sampler_tables import ghost_table, hooks_table
from benchmarks.scale import exchanged_table, memory_table
from benchmarks.speed.tables import images_table, kept_table, peak_table, ratio_table, step_table
from benchmarks.stream import epochs_table
from benchmarks.theory.private import private_table
from pws._errors import PwsError, UnknownNameError, one_line, reason_of, shown
from pws._files import write_whole
from pws.bench.grid_tables import StoredCell, accuracy_table, mask_table, range_table, rate_table, steps_table
from pws.bench.result_file import Result
from pws.cli.arguments import command_parser, parse
from pws.training.parsing import check_entries

MARKED: Final = re.compile(r"(<!-- table ([\w/+-]+)(?: (\w+))?(?:: ([^>]*?))? -->\n).*?(<!-- end -->)", re.DOTALL)
TABLES: Final[dict[str, dict[str, Callable[[Result], str]]]] = {
    "grid": {
        "accuracy": accuracy_table,
        "steps": steps_table,
        "range": range_table,
        "masks": mask_table,
        "rate": rate_table,
    },
    "suite": {
        "ratio": ratio_table,
        "images": images_table,
        "memory": kept_table,
        "peak": peak_table,
        "step": step_table,
    },
    "networks": {"accuracy": warm_start_table},
    "trained_networks": {"accuracy": trainable_table},
    "models": {"summary": conversions_summary, "all": conversions_table},
    "exchanged": {"exchanged": exchanged_table, "memory": memory_table},
    "epochs": {"epochs": epochs_table},
    "private": {"shares": private_table},
    "samplers": {"hooks": hooks_table, "ghost": ghost_table},
}
"""By a key of the result (of one of `MADE_BY`), its tables; the first is the main one."""
MADE_BY: Final = (
    "accuracy",
    "speed",
    "warm-start",
    "convert",
    "scale",
    "stream",
    "make-trainable",
    "samplers",
    "private",
)


def run(arguments: list[str]) -> int:
    """Rewrite the documents whose tables differ, and say which."""
    parser = command_parser(
        "tables",
        "Fill the tables of documents, between <!-- table NAME: ROW; ROW --> and <!-- end -->, from "
        "benchmarks/results/NAME.json; NAME is such as accuracy/collapse, and "
        "NAME+NAME joins the tables of two results, of which ROW? need not be in both.",
        f"{PROGRAM} tables",
        PROGRAM,
    )
    parser.add_argument("documents", type=str, nargs="*", help="Markdown files; README.md and all of docs if left out")
    parser.add_argument("--results", type=str, default=str(RESULTS), help="folder of NAME.json")
    parsed = parse(parser, arguments)
    texts = {path: _text(path) for path in map(Path, parsed.documents or documents())}
    filled = {path: fill_tables(text, Path(parsed.results)) for path, text in texts.items()}
    for path, text in filled.items():
        changed = text != texts[path]
        if changed:
            write_whole(path, text)
        print(f"{path}: {'filled' if changed else 'up to date'}")
    return 0


def documents() -> list[Path]:
    """The README and the documentation's pages."""
    root = ROOT.parent
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PwsError(f"{path} must be a text in UTF-8: {one_line(error)}.") from error


def fill_tables(text: str, results: Path) -> str:
    """`text` with its tables made anew from `results/NAME.json`.

    Raises:
        PwsError: a table's result file or one of its rows is missing.
        UnknownNameError: the result has no such table.
    """

    def table(found: re.Match[str]) -> str:
        start, names, kind, listed, end = found.groups()
        rows = None if listed is None else [row.strip() for row in listed.split(";")]
        tables = [_table(results, name, kind, rows) for name in names.split("+")]
        return f"{start}\n{_side_by_side(tables).rstrip()}\n\n{end}"  # Markdown takes a line right below for a row

    return MARKED.sub(table, text)


def _table(results: Path, name: str, kind: str | None, rows: Sequence[str] | None) -> str:
    path, command = results / f"{name}.json", f"{PROGRAM} {name.replace('/', ' ')}"
    result = _result(path, command, rows)
    tables = next((tables for key, tables in TABLES.items() if key in result), {})
    if not tables:
        raise PwsError(f"{path} has no table: it is no result of {PROGRAM} {', '.join(MADE_BY)}.")
    if kind is not None and kind not in tables:
        raise UnknownNameError(f"table of {path}:", kind, tables)
    try:
        return tables[kind or next(iter(tables))](result)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise PwsError(f"{path} is damaged ({reason_of(error)}). Make it again with `{command}`.") from error


def _side_by_side(tables: Sequence[str]) -> str:
    """Tables of methods as one: a row of a method is as long as all of them, with - where a table lacks it."""
    if len(tables) == 1:
        return tables[0]
    rests = [dict(line.split(" | ", 1) for line in table.splitlines()) for table in tables]
    starts = dict.fromkeys(start for rest in rests for start in rest)
    empty = [" | ".join("-" * next(iter(rest.values())).count("|")) + " |" for rest in rests]
    lines = [
        " | ".join(
            [start, *(rest.get(start, none).removesuffix(" |") for rest, none in zip(rests, empty, strict=True))]
        )
        for start in starts
    ]
    return "".join(f"{line} |\n" for line in lines)


def _result(path: Path, command: str, rows: Sequence[str] | None) -> Result:
    if not path.is_file():
        raise PwsError(f"a table wants {path}, which is missing. Make it with `{command}`.")
    try:
        result: Result = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PwsError(f"{path} is damaged ({reason_of(error)}). Make it again with `{command}`.") from error
    if not isinstance(result, dict):
        raise PwsError(f"{path} holds no result; got {shown(result)}. Make it again with `{command}`.")
    if rows is None:
        return result
    known = result.get("rows")
    if not (isinstance(known, dict | list) and all(isinstance(row, str) for row in known)):
        raise PwsError(f"{path} is damaged: rows must be a list or a mapping; got {shown(known)}.")
    for row in rows:
        if row.removesuffix("?") not in known and not row.endswith("?"):
            raise PwsError(f"{path} has no row {row!r}; it has: {'; '.join(known)}.")
    rows = [name for row in rows if (name := row.removesuffix("?")) in known]
    cells = result.get("cells", [])
    check_entries(StoredCell, cells, f"{path}, cells")
    kept = {row: known[row] for row in rows} if isinstance(known, dict) else list(rows)
    return {**result, "rows": kept, "cells": [cell for cell in cells if cell["row"] in rows]}
