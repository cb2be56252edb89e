"""`pws bench accuracy`: grids are read and checked, cells train as their recipes say, and a grid goes on where it stopped."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pws
from pws.bench import pool
from pws.bench.cell import train_cell
from pws.bench.cell_result import CellResult
from pws.bench.grid import load_grid
from pws.bench.grid_tables import accuracy_table, mask_table, over_seeds, range_table, rate_table, rates_of, steps_table
from pws.bench.pool import run_grid, stored_cell
from pws.cli import main
from pws.training.callbacks import Clock

pytestmark = pytest.mark.slow
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


def test_a_cell_tells_its_accuracy_its_curve_and_where_it_broke(tmp_path: Path) -> None:
    grid = load_grid(write(tmp_path, GRID.replace("batch_size: 32", "batch_size: 32, validation: 0")))
    cells = {cell.key: cell for cell in grid.cells}
    good = train_cell(cells["none", "LR 0.01", 0], grid.evaluations, grid.evaluation_images)
    assert (good.steps, good.non_finite_step, [step for step, _ in good.curve]) == (4, None, [2, 4])
    assert good.validation is None
    assert good.accuracy is not None
    assert good.curve[-1][1] == pytest.approx(
        good.accuracy, abs=1e-4
    )  # digits have fewer test images than are asked for
    again = train_cell(cells["none", "LR 0.01", 0], grid.evaluations, grid.evaluation_images)
    assert (again.accuracy, again.curve, again.train_loss) == (good.accuracy, good.curve, good.train_loss)
    broken = train_cell(cells["none", "LR 1e+09", 0], grid.evaluations, grid.evaluation_images)
    assert broken.accuracy is None
    assert 1 <= (broken.non_finite_step or 0) <= 4


def test_a_cell_is_tested_with_the_average_of_its_weights(tmp_path: Path) -> None:
    plain, average = (
        load_grid(write(tmp_path, GRID.replace("columns:", f"  optim: {{ema: {decay}}}\ncolumns:"))).cells[0]
        for decay in ("null", "0.9")
    )
    losses = [train_cell(cell, 1, 8).metrics["loss"] for cell in (plain, average)]
    assert losses[0] != losses[1]


def test_the_curve_of_a_cell_is_that_of_its_validation_images(tmp_path: Path) -> None:
    grid = load_grid(write(tmp_path, GRID.replace("batch_size: 32", "batch_size: 32, validation: 0.5")))
    result = train_cell(grid.cells[0], grid.evaluations, grid.evaluation_images)
    assert result.validation is not None
    assert result.curve[-1][1] == pytest.approx(result.validation, abs=1e-4)
    assert stored_cell(grid.cells[0], result, 0.5)["validation"] == pytest.approx(result.validation)


def test_a_grid_goes_on_where_it_stopped_and_trains_changed_cells_again(tmp_path: Path) -> None:
    path, out = write(tmp_path), tmp_path / "out"
    arguments = ["bench", "accuracy", str(path), "--jobs=2", f"--out={out}"]
    assert main(arguments) == 0
    stored = json.loads((out / "small.json").read_text())
    assert len(stored["cells"]) == 6
    assert stored["commit"]
    places = [(cell["row"], cell["column"]) for cell in stored["cells"][:4]]
    assert places == [("none", "LR 0.01"), ("none", "LR 1e+09"), ("loud", "LR 0.01"), ("loud", "LR 1e+09")]
    for cell in stored["cells"][:4]:
        cell["commit"] = "kept"
    stored["rows"]["loud"]["model.gain"] = 1.0
    (out / "small.json").write_text(json.dumps({**stored, "cells": stored["cells"][:4]}))
    assert main(arguments) == 0
    cells = json.loads((out / "small.json").read_text())["cells"]
    assert len(cells) == 6
    assert [(cell["row"], cell["column"]) for cell in cells if cell["commit"] == "kept"] == places[:2]
    for kind in ("heat", "lines"):
        assert (out / f"small-{kind}.png").read_bytes().startswith(b"\x89PNG")
    assert accuracy_table(json.loads((out / "small.json").read_text())) in (out / "small.md").read_text()


def test_another_target_trains_all_cells_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[dict[Any, Any]] = []
    monkeypatch.setattr(pool, "each_apart", lambda _, tasks, *__: waiting.append(tasks) or iter(()))
    grid, result = load_grid(write(tmp_path)), CellResult(0.25, 1.5, None, None, 8, 9.0, "abc", [(2, 0.05)])
    content = {"target": grid.target, "settings": grid.settings, "columns": grid.columns, "rows": grid.rows}
    content["cells"] = [stored_cell(cell, result, grid.target) for cell in grid.cells]
    (tmp_path / "small.json").write_text(json.dumps(content))
    for target in (0.1, 0.2):  # a stored cell tells the steps to one target
        run_grid(replace(grid, target=target), tmp_path / "small.json", "here", 1, lambda _: None, lambda *_: None)
    assert [len(tasks) for tasks in waiting] == [0, 6]


def test_what_is_kept_of_a_cell(tmp_path: Path) -> None:
    cell = load_grid(write(tmp_path)).cells[0]
    curve = [(2, 0.05), (4, 0.1), (6, 0.3), (8, 0.2)]
    result = CellResult(0.25, 1.5, None, None, 8, 9.0, "abc", curve)
    kept = {"row": "none", "column": "LR 0.01", "seed": 0, "accuracy": 0.25, "non_finite_step": None, "commit": "abc"}
    assert stored_cell(cell, result, 0.1) == {**kept, "steps_to_target": 4}
    assert stored_cell(cell, result, 0.3) == {**kept, "steps_to_target": 6}
    assert stored_cell(cell, result, 0.4) == {**kept, "steps_to_target": None}


def kept_cell(row: str, lr: float, seed: int, accuracy: float | None, steps: int | None) -> dict[str, Any]:
    ended = {"accuracy": accuracy, "non_finite_step": None if accuracy is not None else 7}
    return {"row": row, "column": f"LR {lr:g}", "seed": seed, **ended, "steps_to_target": steps}


RESULT = {
    "grid": "small",
    "target": 0.8,
    "settings": {"model.name": "allconv", "data.batch_size": 4},
    "rows": {"a": {"model.method": "bn"}, "b": {"model.method": "none"}},
    "columns": {f"LR {lr:g}": {"optim.lr": lr} for lr in (0.1, 0.2, 0.4)},
    "cells": [
        kept_cell("a", 0.1, 0, 0.90, 10),
        kept_cell("a", 0.1, 1, 0.80, 5),
        kept_cell("a", 0.2, 0, 0.50, None),
        kept_cell("a", 0.4, 0, None, None),
        kept_cell("a", 0.4, 1, 0.60, 5),
        kept_cell("b", 0.1, 0, 0.10, None),
        kept_cell("b", 0.2, 0, None, None),
    ],
}


def test_the_tables() -> None:
    assert accuracy_table(RESULT).splitlines()[2:] == [
        "| a | **85.0 ± 7.1** | **50.0** | 60.0, 1 of 2 nan@7 |",
        "| b | 10.0 | nan@7 | - |",
    ]
    assert steps_table(RESULT).splitlines()[2:] == ["| a | 7.5 | - | - |", "| b | - | - | - |"]
    assert range_table(RESULT).splitlines()[2:] == ["| a | 0.1 to 0.2 |", "| b | none |"]
    assert over_seeds(RESULT)["a", "LR 0.4"].mean is None


def test_the_rate_is_chosen_on_validation_images_where_there_are_some() -> None:
    head = "| method | allconv, batch 4 |"
    assert rate_table(RESULT).splitlines() == [
        *(head, "| --- | ---: |"),
        "| a | **85.0 ± 7.1** (LR 0.1) |",
        "| b | 10.0 (LR 0.1) |",
    ]
    # The rate with the better validation score is not that with the better test score.
    validated = {0.1: 0.7, 0.2: 0.8, 0.4: None}
    cells = [
        cell | {"validation": validated[float(cell["column"].removeprefix("LR "))]} if cell["accuracy"] else cell
        for cell in RESULT["cells"]
    ]
    assert rate_table({**RESULT, "cells": cells}).splitlines()[2:] == [
        "| a | **50.0** (LR 0.2) |",
        "| b | 10.0 (LR 0.1) |",
    ]
    one = {**RESULT, "columns": {"LR 0.1": {"optim.lr": 0.1}}, "cells": [c for c in cells if c["column"] == "LR 0.1"]}
    assert rate_table(one) == ""


def test_the_table_of_masks_tells_failed_runs_and_marks_no_zero() -> None:
    def cell(row: str, column: str, mask_ap: float | None, step: int | None = None) -> dict[str, Any]:
        score = {"accuracy": None if step else 0.5, "non_finite_step": step, "steps_to_target": None}
        return {"row": row, "column": column, "seed": 0, **score, **({} if mask_ap is None else {"mask_ap": mask_ap})}

    cells = [cell("a", "mask", 0.25), cell("b", "mask", None, 7), cell("a", "low", 0.0004), cell("b", "low", 0.0)]
    result = {"rows": {"a": {}, "b": {}}, "columns": {"mask": {}, "low": {}, "boxes": {}}}
    table = mask_table({**result, "cells": [*cells, cell("a", "boxes", None), cell("b", "boxes", None, 3)]})
    assert table.splitlines()[0] == "| method | mask | low |"
    assert table.splitlines()[2:] == ["| a | **25.0** | 0.0 |", "| b | nan@7 | 0.0 |"]


def test_settings_left_at_their_defaults_are_named_in_the_tables() -> None:
    columns: dict[str, dict[str, Any]] = {"accuracy": {}, "1,200 images, LR 0.2": {"optim.lr": 0.2}}
    cells = [{"row": "bn", "column": column, "seed": 0} for column in columns]
    assert rates_of({"settings": {}, "rows": {"bn": {}}, "columns": columns, "cells": cells}) == {
        "allconv, batch 128": [(0.1, "accuracy")],
        "allconv, batch 128, 1,200 images": [(0.2, "1,200 images, LR 0.2")],
    }


@pytest.mark.parametrize(("task", "label"), [("classify", "accuracy"), ("detect", "box AP")])
def test_an_only_column_is_named_by_what_it_holds(task: str, label: str, tmp_path: Path) -> None:
    model = {"classify": "allconv", "detect": "ssd-vgg16"}[task]
    text = f"settings: {{task: {task}}}\ncolumns: [{{model.name: {model}}}]\nrows: {{bn: {{}}}}\n"
    (tmp_path / "grid.yaml").write_text(text)
    grid = load_grid(tmp_path / "grid.yaml")
    assert list(grid.columns) == [label]
    cell = {"row": "bn", "column": label, "seed": 0}
    stored = {"settings": grid.settings, "rows": grid.rows, "columns": grid.columns, "cells": [cell]}
    assert [name.count(",") for name in rates_of(stored)] == [1]  # network and batch size alone


def test_columns_can_differ_in_images_and_augmentation(tmp_path: Path) -> None:
    columns = (
        "data.batch_size: 8, data.augment: true",
        "data.batch_size: 8, data.train_images: null",
        "data.batch_size: 2",
    )
    text = GRID.replace("  - {optim.lr: 0.01}\n  - {optim.lr: 1.0e+9}", "\n".join(f"  - {{{c}}}" for c in columns))
    assert tuple(load_grid(write(tmp_path, text)).columns) == ("batch 8, augmented", "batch 8, all images", "batch 2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GRID.replace("rows:", "lines:"), "grid key in .*: 'lines'"),
        (GRID.replace("optim.lr: 0.01", "optim.lrr: 0.01"), "column 1: 'optim.lrr'; did you mean optim.lr"),
        (GRID.replace("optim.lr: 0.01", "optim.lr: 1.0e+9"), "columns must differ"),
        (GRID.replace("max_steps: 4", "max_steps: 4, precision: 64-true"), "alone; got trainer.precision '64-true'"),
        (GRID.replace("max_steps: 4", "max_steps: 4, devices: 2"), "alone; got trainer.devices 2"),
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
        load_grid(write(tmp_path, text))
    assert main(["bench", "accuracy", str(tmp_path / "small.yaml"), f"--out={tmp_path / 'out'}"]) == 2
    assert capsys.readouterr().err.startswith("pws: ")
    assert not (tmp_path / "out").exists()


def test_the_clock_counts_epochs_that_end_without_validation() -> None:
    clock = Clock()
    for _ in range(2):
        clock.on_train_epoch_start(None, None)
        time.sleep(0.02)
    clock.stop()
    assert clock.seconds >= 0.04


def test_a_grid_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "accuracy", "collapse", f"--out={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert "collapse does not exist" in said
    assert "python -m benchmarks accuracy" in said


@pytest.mark.parametrize("content", ['{"command": "pws train", "models": {}}', "[]", "half a fi"])
def test_a_file_of_something_else_is_left_alone(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "small.json"
    file.write_text(content)
    assert main(["bench", "accuracy", str(write(tmp_path)), f"--out={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert "Choose another folder with --out" in said
    assert ("a file of `pws train`" in said) == ("models" in content)
    assert file.read_text() == content


FEDERATED = """
settings:
  model: {name: stack4, width: 0.05}
  data: {name: digits, train_images: 128, batch_size: 8}
  optim: {lr: 0.05}
  federated: {clients: 3, rounds: 2, alpha: 0.5}
columns:
  - {federated.clients: 2}
  - {federated.clients: 4}
rows:
  bn: {}
  fedbn: {model.method: bn, federated.personal_norms: true}
  loud: {model.method: none, optim.lr: 1.0e+20}
"""


def test_the_cells_of_a_federated_grid_count_rounds(tmp_path: Path) -> None:
    grid = load_grid(write(tmp_path, FEDERATED))
    assert list(grid.columns) == ["2 clients", "4 clients"]
    cells = {cell.key: cell for cell in grid.cells}
    bn, fedbn, loud = (train_cell(cells[row, "2 clients", 0], 1, 8) for row in ("bn", "fedbn", "loud"))
    for result in (bn, fedbn):
        assert (result.steps, [step for step, _ in result.curve]) == (2, [1, 2])
        assert result.validation == max(accuracy for _, accuracy in result.curve)
        assert result.accuracy == result.metrics["accuracy"]
    assert fedbn.metrics["loss"] != bn.metrics["loss"]
    assert (loud.accuracy, loud.non_finite_step) == (None, 1)
