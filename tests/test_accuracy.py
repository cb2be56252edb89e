"""`pws bench accuracy`: grids are read and checked, cells train as their recipes say, and a grid goes on where it stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import pws
from pws.bench.accuracy import load_grid, shipped_grids
from pws.bench.accuracy.cell import train_cell
from pws.bench.accuracy.table import accuracy_table, range_table, rates_of, steps_table, summarize
from pws.bench.fill import MARKED, fill_tables
from pws.cli import main
from pws.training.callbacks import Clock

DOCS = Path(__file__).parents[1] / "docs"
GRID = """
title: two methods on digits
target: 0.1
evaluations: 2
settings:
  model: {name: allconv, width: 0.08}
  data: {name: digits, image_size: 16, train_images: 64, batch_size: 32}
  trainer: {max_steps: 4}
columns:
  - {optim.lr: 0.01}
  - {optim.lr: 1.0e+9}
rows:
  none: {seeds: [0, 1]}
  loud: {model.method: pws}
"""


def write(tmp_path: Path, text: str = GRID) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", shipped_grids())
@pytest.mark.parametrize("quick", [False, True])
def test_shipped_grids_are_whole(name: str, quick: bool) -> None:
    grid = load_grid(name, quick=quick)
    keys = [cell.key for cell in grid.cells]
    assert len(keys) == len(set(keys)) >= len(grid.rows) * len(grid.columns)
    assert {cell.row for cell in grid.cells} == set(grid.rows)
    assert {cell.column for cell in grid.cells} == set(grid.columns)
    assert {cell.recipe.data.name for cell in grid.cells} == {"digits" if quick else "fashion-mnist"}


def test_collapse_is_the_published_setting() -> None:
    cells = {(cell.row, cell.column): cell.recipe for cell in load_grid("collapse").cells}
    settings = [
        (recipe.data.batch_size, recipe.optim.lr, recipe.trainer.max_steps)
        for (row, _), recipe in cells.items()
        if row == "pws"
    ]
    large, small = [(128, lr, 150) for lr in (0.01, 0.1, 0.5)], [(4, lr, 600) for lr in (0.0025, 0.025, 0.125)]
    assert sorted(settings) == sorted(large + small)
    recipe = cells["bn, clipped", "batch 4, LR 0.025"]
    assert (recipe.model.method, recipe.optim.clip_norm, recipe.optim.step_bound) == ("bn", 1.0, "method")
    assert (recipe.optim.momentum, recipe.optim.weight_decay, recipe.optim.schedule) == (0.9, 5e-4, "linear")
    assert (recipe.data.train_images, recipe.model.name, round(96 * recipe.model.width)) == (12_800, "allconv", 32)


def test_a_cell_tells_its_accuracy_its_curve_and_where_it_broke(tmp_path: Path) -> None:
    grid = load_grid(str(write(tmp_path)))
    cells = {cell.key: cell for cell in grid.cells}
    good = train_cell(cells["none", "LR 0.01", 0], grid.evaluations, grid.evaluation_images)
    assert (good.steps, good.non_finite_step, [step for step, _ in good.curve]) == (4, None, [2, 4])
    assert good.accuracy is not None
    assert good.curve[-1][1] == pytest.approx(
        good.accuracy, abs=1e-4
    )  # digits have fewer test images than are asked for
    again = train_cell(cells["none", "LR 0.01", 0], grid.evaluations, grid.evaluation_images)
    assert (again.accuracy, again.curve, again.train_loss) == (good.accuracy, good.curve, good.train_loss)
    broken = train_cell(cells["none", "LR 1e+09", 0], grid.evaluations, grid.evaluation_images)
    assert broken.accuracy is None
    assert 1 <= (broken.non_finite_step or 0) <= 4


def test_a_grid_goes_on_where_it_stopped_and_trains_changed_cells_again(tmp_path: Path) -> None:
    path, out = write(tmp_path), tmp_path / "out"
    arguments = ["bench", "accuracy", str(path), "--jobs=2", f"--out={out}"]
    assert main(arguments) == 0
    stored = json.loads((out / "small.json").read_text())
    assert len(stored["cells"]) == 6
    assert stored["commit"]
    marked = [cell["row"] for cell in stored["cells"][:3]]
    for cell in stored["cells"][:3]:
        cell["seconds"] = 12345.0
    stored["cells"][0]["settings"]["optim.lr"] = 0.02
    (out / "small.json").write_text(json.dumps({**stored, "cells": stored["cells"][:4]}))
    assert main(arguments) == 0
    cells = json.loads((out / "small.json").read_text())["cells"]
    assert len(cells) == 6
    assert [cell["row"] for cell in cells if cell["seconds"] == 12345.0] == marked[1:]
    for kind in ("heat", "lines", "curves"):
        assert (out / f"small-{kind}.png").read_bytes().startswith(b"\x89PNG")
    assert accuracy_table(json.loads((out / "small.json").read_text())) in (out / "small.md").read_text()


def stored_cell(row: str, lr: float, seed: int, accuracy: float | None, curve: list[Any]) -> dict[str, Any]:
    settings = {"model.name": "allconv", "data.batch_size": 4, "optim.lr": lr}
    ended = {"accuracy": accuracy, "non_finite_step": None if accuracy is not None else 7}
    return {"row": row, "column": f"LR {lr:g}", "seed": seed, "settings": settings, "curve": curve, **ended}


RESULT = {
    "grid": "small",
    "target": 0.8,
    "rows": ["a", "b"],
    "columns": ["LR 0.1", "LR 0.2", "LR 0.4"],
    "cells": [
        stored_cell("a", 0.1, 0, 0.90, [[5, 0.7], [10, 0.8]]),
        stored_cell("a", 0.1, 1, 0.80, [[5, 0.85]]),
        stored_cell("a", 0.2, 0, 0.50, []),
        stored_cell("a", 0.4, 0, None, []),
        stored_cell("a", 0.4, 1, 0.60, [[5, 0.9]]),
        stored_cell("b", 0.1, 0, 0.10, []),
        stored_cell("b", 0.2, 0, None, []),
    ],
}


def test_the_tables() -> None:
    assert accuracy_table(RESULT).splitlines()[2:] == [
        "| a | **85.0 ± 7.1** | **50.0** | 60.0, 1 of 2 nan@7 |",
        "| b | 10.0 | nan@7 | - |",
    ]
    assert steps_table(RESULT).splitlines()[2:] == ["| a | 7.5 | - | - |", "| b | - | - | - |"]
    assert range_table(RESULT).splitlines()[2:] == ["| a | 0.1 to 0.2 |", "| b | none |"]
    assert summarize(RESULT)["a", "LR 0.4"].mean is None


def test_settings_left_at_their_defaults_are_named_in_the_tables() -> None:
    cells = [{"column": "accuracy", "settings": {}}, {"column": "1,200 images, LR 0.2", "settings": {"optim.lr": 0.2}}]
    assert rates_of({"cells": cells}) == {
        "allconv, batch 128": [(0.1, "accuracy")],
        "allconv, batch 128, 1,200 images": [(0.2, "1,200 images, LR 0.2")],
    }


def test_columns_can_differ_in_images_and_augmentation(tmp_path: Path) -> None:
    columns = (
        "data.batch_size: 8, data.augment: true",
        "data.batch_size: 8, data.train_images: null",
        "data.batch_size: 2",
    )
    text = GRID.replace("  - {optim.lr: 0.01}\n  - {optim.lr: 1.0e+9}", "\n".join(f"  - {{{c}}}" for c in columns))
    assert load_grid(str(write(tmp_path, text))).columns == ("batch 8, augmented", "batch 8, all images", "batch 2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GRID.replace("rows:", "lines:"), "grid key in .*: 'lines'"),
        (GRID.replace("optim.lr: 0.01", "optim.lrr: 0.01"), "column 1: 'optim.lrr'; did you mean optim.lr"),
        (GRID.replace("optim.lr: 0.01", "optim.lr: 1.0e+9"), "columns must differ"),
        (GRID.replace("optim.lr: 0.01", "optim.lr: small"), "column 1: optim.lr: Expected a float. Got value: small"),
        (GRID.replace("optim.lr: 0.01", "optim.lr: -1"), "optim.lr must be at least 0"),
        ("rows: {bn: {}}", "missing: columns"),
        ("- 1", "must hold a grid's keys"),
        ("a: [", "not a YAML file"),
    ],
)
def test_a_grid_that_is_wrong_is_refused(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(pws.PwsError, match=message):
        load_grid(str(write(tmp_path, text)))
    assert main(["bench", "accuracy", str(tmp_path / "small.yaml"), f"--out={tmp_path / 'out'}"]) == 2
    assert capsys.readouterr().err.startswith("pws: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "document", ["README.md", *(f"docs/{path.relative_to(DOCS)}" for path in sorted(DOCS.rglob("*.md")))]
)
def test_the_documents_tables_are_those_of_the_result_files(document: str) -> None:
    root = Path(__file__).parents[1]
    text = (root / document).read_text()
    assert fill_tables(text, root / "benchmarks") == text


def test_the_documents_have_tables() -> None:
    assert len(MARKED.findall((DOCS.parent / "README.md").read_text())) >= 2
    assert len(MARKED.findall((DOCS / "explanation" / "methods.md").read_text())) >= 6


def test_tables_are_filled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small.json").write_text(json.dumps(RESULT))
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- table small: b -->\nold\n<!-- end -->\nafter\n")
    arguments = ["bench", "tables", str(document), f"--results={tmp_path}"]
    assert main(arguments) == 0
    lines = document.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "| b | **10.0** | nan@7 |" in lines
    assert "old" not in lines
    assert main(arguments) == 0
    assert document.read_text().splitlines() == lines
    assert "up to date" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("marker", "message"),
    [("small: c", "no row 'c'; it has: a; b"), ("other", "is missing"), ("small stepps", "did you mean steps")],
)
def test_a_table_that_cannot_be_filled_is_refused(marker: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "small.json").write_text(json.dumps(RESULT))
    with pytest.raises(pws.PwsError, match=message):
        fill_tables(f"<!-- table {marker} -->\n<!-- end -->", tmp_path)


def test_an_unknown_grid_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "accuracy", "colapse"]) == 2
    assert "did you mean collapse" in capsys.readouterr().err


@pytest.mark.parametrize("content", ['{"command": "pws bench convert", "models": {}}', "[]", "half a fi"])
def test_a_file_of_something_else_is_left_alone(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "convert.json"
    file.write_text(content)
    assert main(["bench", "accuracy", "convert", "--quick", f"--out={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert "Choose another folder with --out" in said
    assert ("a file of `pws bench convert`" in said) == ("models" in content)
    assert file.read_text() == content


def test_the_clock_counts_epochs_that_end_without_validation() -> None:
    clock = Clock()
    for _ in range(2):
        clock.on_train_epoch_start(None, None)
        time.sleep(0.02)
    clock.stop()
    assert clock.seconds >= 0.04


def test_an_interrupted_grid_keeps_its_cells(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", "import sys; from pws.cli import main; sys.exit(main())"]
    arguments = ["bench", "accuracy", "collapse", "--quick", "--jobs=1", f"--out={out}"]
    process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (out / "collapse.json").exists():
        time.sleep(0.05)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; `pws bench accuracy`" in said
    kept = json.loads((out / "collapse.json").read_text())["cells"]
    assert 0 < len(kept) < 30


def test_a_shipped_grid_of_several_networks_runs(tmp_path: Path) -> None:
    assert main(["bench", "accuracy", "residual", "--quick", f"--out={tmp_path}"]) == 0
    result = json.loads((tmp_path / "residual.json").read_text())
    assert {cell["settings"]["model.name"] for cell in result["cells"]} == {"cifar-resnet18", "preact"}
    assert result["command"] == "pws bench accuracy residual --quick"
    assert all(cell["steps"] == 4 for cell in result["cells"] if cell["non_finite_step"] is None)
