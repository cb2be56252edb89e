"""Tables in documents, filled from result files.

A document says where a table goes: of which result, which of its tables if not the main one, and which rows if not all:

    <!-- table accuracy/collapse: bn; pws -->
    <!-- end -->
    <!-- table accuracy/rates range -->
    <!-- end -->
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from pws._errors import PwsError, UnknownNameError, reason_of, shown
from pws.bench.accuracy.table import StoredCell, accuracy_table, range_table, steps_table
from pws.bench.conversion.run import conversions_summary, conversions_table
from pws.bench.speed.report import images_table, kept_table, peak_table, ratio_table, step_table
from pws.bench.warm_start import warm_start_table
from pws.training.parsing import check_entries, parse_as

MARKED: Final = re.compile(r"(<!-- table ([\w/-]+)(?: (\w+))?(?:: ([^>]*?))? -->\n).*?(<!-- end -->)", re.DOTALL)
Result = dict[str, Any]
TABLES: Final[dict[str, dict[str, Callable[[Result], str]]]] = {
    "grid": {"accuracy": accuracy_table, "steps": steps_table, "range": range_table},
    "suite": {
        "ratio": ratio_table,
        "images": images_table,
        "memory": kept_table,
        "peak": peak_table,
        "step": step_table,
    },
    "networks": {"accuracy": warm_start_table},
    "models": {"summary": conversions_summary, "all": conversions_table},
}
"""By a key of the result (of `pws bench accuracy`, `speed`, `warm-start`, `convert`), its tables; the first is the main one."""


MADE_BY: Final = ("accuracy", "speed", "warm-start", "convert")


def fill_tables(text: str, results: Path) -> str:
    """`text` with its tables made anew from `results/NAME.json`.

    Raises:
        PwsError: a table's result file or one of its rows is missing.
        UnknownNameError: the result has no such table.
    """

    def table(found: re.Match[str]) -> str:
        start, name, kind, rows, end = found.groups()
        path, command = results / f"{name}.json", f"pws bench {name.replace('/', ' ')}"
        result = _result(path, command, rows)
        tables = next((tables for key, tables in TABLES.items() if key in result), {})
        if not tables:
            raise PwsError(f"{path} has no table: it is no result of pws bench {', '.join(MADE_BY)}.")
        if kind is not None and kind not in tables:
            raise UnknownNameError(f"table of {path}:", kind, tables)
        try:
            filled = tables[kind or next(iter(tables))](result)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise PwsError(f"{path} is damaged ({reason_of(error)}). Make it again with `{command}`.") from error
        return f"{start}\n{filled}\n{end}"

    return MARKED.sub(table, text)


def _result(path: Path, command: str, rows: str | None) -> Result:
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
    chosen, known = [row.strip() for row in rows.split(";")], parse_as(list[str], result.get("rows"), f"{path}, rows")
    for row in chosen:
        if row not in known:
            raise PwsError(f"{path} has no row {row!r}; it has: {'; '.join(known)}.")
    cells = result.get("cells", [])
    check_entries(StoredCell, cells, f"{path}, cells")
    return {**result, "rows": chosen, "cells": [cell for cell in cells if cell["row"] in chosen]}
