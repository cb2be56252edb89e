"""`python -m benchmarks accuracy`: the grids behind the documentation are whole, and run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.accuracy.command import quick
from benchmarks.accuracy.rules import ROWS, rules_grid
from benchmarks.accuracy.shipped import GRIDS, shipped_grid

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("small", [False, True])
def test_shipped_grids_are_whole(name: str, small: bool) -> None:
    grid = quick(shipped_grid(name)) if small else shipped_grid(name)
    keys = [cell.key for cell in grid.cells]
    assert len(keys) == len(set(keys)) >= len(grid.rows) * len(grid.columns)
    assert {cell.row for cell in grid.cells} == set(grid.rows)
    assert {cell.column for cell in grid.cells} == set(grid.columns)
    names = ("digit-scenes", "scenes") if name.startswith("detection") else ("digits", "fashion-mnist")
    assert {cell.recipe.data.name for cell in grid.cells} == {names[0] if small else names[1]}
    assert not small or all(cell.recipe.model.backbone is None for cell in grid.cells)


def test_collapse_is_the_published_setting() -> None:
    cells = {(cell.row, cell.column): cell.recipe for cell in shipped_grid("collapse").cells}
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


def test_the_rules_are_trained_in_the_cells_of_the_ablation() -> None:
    grid, ablation = rules_grid(), shipped_grid("ablation")
    assert (grid.name, list(grid.rows), grid.columns) == ("rules", list(ROWS), ablation.columns)
    plain = [cell.recipe for cell in ablation.cells if cell.row == "pws"]
    assert [cell.recipe for cell in grid.cells] == [recipe for _ in ROWS for recipe in plain]
    assert [ROWS[row]().step_bound for row in ("AGC 0.05", "alpha = exp(a)")] == [None, 0.03]


def test_the_rules_run(tmp_path: Path) -> None:
    assert main(["accuracy", "rules", "--quick", "--jobs=1", f"--out={tmp_path}"]) == 0
    cells = json.loads((tmp_path / "rules.json").read_text())["cells"]
    assert {cell["row"] for cell in cells} == set(ROWS)
    assert len(cells) == 2 * len(ROWS)
    # The bound of the default, another rule in its place, another form of alpha: other networks after four steps.
    assert len({cell["accuracy"] for cell in cells}) > 2


def test_an_unknown_grid_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["accuracy", "colapse"]) == 2
    assert "did you mean collapse" in capsys.readouterr().err


@pytest.mark.parametrize("content", ['{"command": "python -m benchmarks convert", "models": {}}', "[]", "half a fi"])
def test_a_file_of_something_else_is_left_alone(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "convert.json"
    file.write_text(content)
    assert main(["accuracy", "convert", "--quick", f"--out={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert "Choose another folder with --out" in said
    assert ("a file of `python -m benchmarks convert`" in said) == ("models" in content)
    assert file.read_text() == content


def test_an_interrupted_grid_keeps_its_cells(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", "import sys; from benchmarks.__main__ import main; sys.exit(main())"]
    arguments = ["accuracy", "collapse", "--quick", "--jobs=1", f"--out={out}"]
    process = subprocess.Popen(
        [*command, *arguments], stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT
    )
    while not (out / "collapse.json").exists():
        time.sleep(0.05)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "benchmarks: interrupted; the same command goes on" in said
    kept = json.loads((out / "collapse.json").read_text())["cells"]
    assert 0 < len(kept) < 30


def test_a_shipped_grid_of_several_networks_runs(tmp_path: Path) -> None:
    assert main(["accuracy", "residual", "--quick", f"--out={tmp_path}"]) == 0
    result = json.loads((tmp_path / "residual.json").read_text())
    assert {column["model.name"] for column in result["columns"].values()} == {"cifar-resnet18", "preact"}
    assert {cell["column"] for cell in result["cells"]} == set(result["columns"])
    assert result["command"] == "python -m benchmarks accuracy residual --quick"
    assert {column["trainer.max_steps"] for column in result["columns"].values()} == {4}
    assert all(len(line) < 400 for line in (tmp_path / "residual.json").read_text().splitlines())
