"""The demonstration: its cells, its story, its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pws.cli import main
from pws.demo import (
    CONTROL,
    LEARNING_RATES,
    METHOD_ORDER,
    Cell,
    Outcome,
    all_cells,
    average_gradients,
    run_cell,
    sentences,
)
from pws.demo.cells import STEP_BOUND, recipe_of


def test_the_grid() -> None:
    cells = all_cells()
    assert len(cells) == len(set(cells)) == (len(METHOD_ORDER) + 1) * len(LEARNING_RATES)
    for cell in cells:
        bound = recipe_of(cell).optim.gradient_norm()
        assert bound == (pytest.approx(STEP_BOUND / cell.lr) if cell.row in ("pws", CONTROL) else None)


def test_the_plain_network_collapses_where_pws_trains() -> None:
    rate = LEARNING_RATES["very large"]
    none = run_cell(Cell("none", "none", rate, bounded=False), 5, lambda *_: None)
    assert none.accuracy is None
    assert none.collapse_step is not None
    assert 1 <= none.collapse_step < 30
    assert none.non_finite_layer is not None
    assert len(none.variances) == none.collapse_step
    assert none.variances[-1] > 1e6 * none.variances[0]
    pws = run_cell(Cell("pws", "pws", rate, bounded=True), 5, lambda *_: None)
    assert pws.accuracy is not None
    assert pws.accuracy > 0.9
    assert not pws.collapsed


def test_a_cell_repeats_exactly() -> None:
    cell = Cell("bn", "bn", 0.1, bounded=False)
    seen: list[tuple[int, int]] = []
    first, second = (run_cell(cell, 1, lambda *step: seen.append(step)) for _ in range(2))
    assert first == second
    assert seen[:22] == [(step, 22) for step in range(1, 23)]


def test_average_gradients() -> None:
    found = average_gradients()
    assert {len(layers) for layers in found.values()} == {9}
    assert max(found["pws"].values()) < 1e-6
    assert max(found["none"].values()) > 20
    assert max(found["none"].values()) > 2 * max(found["bn"].values())


def test_the_story_tells_what_was_measured() -> None:
    def outcome(cell: Cell) -> Outcome:
        if cell.row in ("none", "wn") and cell.lr > 0.1:
            return Outcome(None, 4, "features.16", (0.5, 2.0, 3e7, 4e20))
        return Outcome(0.975, variances=(0.5, 0.6, 0.7, 0.8, 0.9))

    gradients = {method: {"features.0": 7.0, "features.2": 41.0} for method in METHOD_ORDER}
    what, why, control = sentences({cell: outcome(cell) for cell in all_cells()}, gradients)
    assert "none (NaN @ step 4) and wn (NaN @ step 4) collapsed, while gn (97.5 %), bn (97.5 %) and pws" in what
    assert "squared average gradient was 7 to 41 times" in why
    assert "from 0.5 to 4e+20 with none, from 0.5 to 0.8 with pws" in why
    assert "none with the same bound gave 97.5 %" in control


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--epochs=1", f"--out={tmp_path / 'demo'}"]) == 0
    shown = capsys.readouterr().out
    assert "NaN @ step" in shown
    assert "In the first step of none" in " ".join(shown.split())
    report = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert len(report["cells"]) == 18
    assert report["story"][0] in " ".join((tmp_path / "demo" / "demo.txt").read_text().replace("1. ", "").split())
    assert (tmp_path / "demo" / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_bad_epochs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--epochs=0"]) == 2
    assert "--epochs must be at least 1" in capsys.readouterr().err
