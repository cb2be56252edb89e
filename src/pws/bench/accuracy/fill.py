"""Tables in documents, filled from result files.

A document says where a table goes, of which result and (all if none is named) which rows:

    <!-- table collapse: bn; pws -->
    <!-- end -->
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

from pws.bench.accuracy.table import accuracy_table
from pws.errors import PwsError

MARKED: Final = re.compile(r"(<!-- table ([\w-]+)(?:: ([^>]*?))? -->\n).*?(<!-- end -->)", re.DOTALL)


def fill_tables(text: str, results: Path) -> str:
    """`text` with its tables made anew from `results/NAME.json`.

    Raises:
        PwsError: a table's result file or one of its rows is missing.
    """

    def table(found: re.Match[str]) -> str:
        start, name, rows, end = found.groups()
        return f"{start}\n{accuracy_table(_result(results / f'{name}.json', rows))}\n{end}"

    return MARKED.sub(table, text)


def _result(path: Path, rows: str | None) -> dict[str, Any]:
    if not path.is_file():
        raise PwsError(f"a table wants {path}, which is missing. Make it with `pws bench accuracy {path.stem}`.")
    result: dict[str, Any] = json.loads(path.read_text())
    if rows is None:
        return result
    chosen = [row.strip() for row in rows.split(";")]
    for row in chosen:
        if row not in result["rows"]:
            raise PwsError(f"{path} has no row {row!r}; it has: {'; '.join(result['rows'])}.")
    cells = [cell for cell in result["cells"] if cell["row"] in chosen]
    return {**result, "rows": chosen, "cells": cells}
