"""`python -m benchmarks tables`: the tables of the documents are those of the result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import pws
from benchmarks import RESULTS
from benchmarks.__main__ import main
from benchmarks.convert.tables import conversions_table
from benchmarks.tables import MARKED, documents, fill_tables

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def kept_cell(row: str, accuracy: float | None) -> dict[str, Any]:
    ended = {"accuracy": accuracy, "non_finite_step": None if accuracy is not None else 7}
    return {"row": row, "column": "LR 0.1" if accuracy else "LR 0.2", "seed": 0, **ended, "steps_to_target": None}


RESULT: dict[str, Any] = {
    "grid": "small",
    "target": 0.8,
    "settings": {},
    "rows": {"a": {"model.method": "bn"}, "b": {"model.method": "none"}},
    "columns": {"LR 0.1": {"optim.lr": 0.1}, "LR 0.2": {"optim.lr": 0.2}},
    "cells": [kept_cell("a", 0.9), kept_cell("b", 0.1), kept_cell("b", None)],
}


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_documents_tables_are_those_of_the_result_files(document: Path) -> None:
    text = document.read_text()
    assert fill_tables(text, RESULTS) == text


def test_the_documents_have_tables() -> None:
    found = {document.name: len(MARKED.findall(document.read_text())) for document in documents()}
    assert found["README.md"] >= 2
    assert sum(found.values()) >= 8


def test_the_list_of_converted_models_is_that_of_the_result_file() -> None:
    assert conversions_table(json.loads((RESULTS / "convert.json").read_text())) in (RESULTS / "convert.md").read_text()


def test_the_results_are_small() -> None:
    files = [path for path in RESULTS.rglob("*.json") if "quick" not in path.parts]
    assert len(files) > 15
    assert sum(path.stat().st_size for path in files) < 400_000
    assert sum(path.read_text().count("\n") for path in files) < 4_000
    assert {json.loads(path.read_text())["command"].partition(" benchmarks ")[0] for path in files} == {"python -m"}


def test_tables_are_filled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small.json").write_text(json.dumps(RESULT))
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- table small: b -->\nold\n<!-- end -->\nafter\n")
    arguments = ["tables", str(document), f"--results={tmp_path}"]
    assert main(arguments) == 0
    lines = document.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "| b | **10.0** | nan@7 |" in lines
    assert "old" not in lines
    assert main(arguments) == 0
    assert document.read_text().splitlines() == lines
    assert "up to date" in capsys.readouterr().out


def test_an_empty_line_ends_each_table() -> None:
    ends = [text for path in documents() for text in path.read_text().split("<!-- end -->")[:-1]]
    assert len(ends) > 20
    assert all(text.endswith("|\n\n") for text in ends)


def test_tables_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "small.json").write_text(json.dumps(RESULT))
    (tmp_path / "less.json").write_text(json.dumps(RESULT | {"rows": {"a": {}}, "cells": RESULT["cells"][:1]}))
    text = fill_tables("<!-- table less+small: a; b? -->\n<!-- end -->", tmp_path)
    one, two = (
        fill_tables(f"<!-- table {name} -->\n<!-- end -->", tmp_path).splitlines() for name in ("less", "small")
    )
    a = [next(line for line in table if line.startswith("| a ")) for table in (one, two)]
    assert a[0] + a[1].removeprefix("| a |") in text.splitlines()
    assert "| b | - | 10.0 | nan@7 |" in text.splitlines()
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


@pytest.mark.parametrize(
    ("marker", "message"),
    [("small: c", "no row 'c'; it has: a; b"), ("other", "is missing"), ("small stepps", "did you mean steps")],
)
def test_a_table_that_cannot_be_filled_is_refused(marker: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "small.json").write_text(json.dumps(RESULT))
    with pytest.raises(pws.PwsError, match=message):
        fill_tables(f"<!-- table {marker} -->\n<!-- end -->", tmp_path)
