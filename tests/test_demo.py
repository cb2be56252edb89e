"""The demonstration: its runs, its story, its files."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pytest

from pws.cli import main
from pws.demo import (
    CONTROL,
    LEARNING_RATES,
    METHOD_ORDER,
    DemoResult,
    DemoRun,
    all_runs,
    sentences,
    train_run,
)
from pws.demo.runs import recipe_of_run
from pws.optim.bound import STEP_BOUND

pytestmark = pytest.mark.slow


def test_the_grid() -> None:
    runs = all_runs()
    assert len(runs) == len(set(runs)) == (len(METHOD_ORDER) + 1) * len(LEARNING_RATES)
    for run in runs:
        assert recipe_of_run(run).optim.step_bound == (STEP_BOUND if run.row in ("pws", CONTROL) else None)


def test_the_plain_network_collapses_where_pws_trains() -> None:
    rate = LEARNING_RATES["very large"]
    none, monitor = train_run(DemoRun("none", "none", rate, bounded=False), 5, lambda *_: None)
    assert none.accuracy is None
    assert none.collapse_step is not None
    assert 1 <= none.collapse_step < 30
    assert none.non_finite_layer is not None
    assert len(none.variances) == none.collapse_step
    assert none.variances[-1] > 1e6 * none.variances[0]
    assert monitor.first_unhealthy is not None
    assert monitor.first_unhealthy.verdict.cause == "shift"
    assert none.verdict == str(monitor.first_unhealthy.verdict)
    assert max(none.average_gradients.values()) > 20
    pws, monitor = train_run(DemoRun("pws", "pws", rate, bounded=True), 5, lambda *_: None)
    assert pws.accuracy is not None
    assert pws.accuracy > 0.9
    assert not pws.collapsed
    assert monitor.first_unhealthy is None
    assert len(pws.average_gradients) == 10
    assert max(pws.average_gradients.values()) == 0


def test_a_run_repeats_exactly() -> None:
    run = DemoRun("bn", "bn", 0.1, bounded=False)
    seen: list[tuple[int, int]] = []
    first, second = (train_run(run, 1, lambda *step: seen.append(step))[0] for _ in range(2))
    assert first == second
    assert seen[:22] == [(step, 22) for step in range(1, 23)]


def test_the_story_tells_what_was_measured() -> None:
    gradients = {"features.0": 7.0, "features.2": 41.0}

    def result(run: DemoRun) -> DemoResult:
        if run.row in ("none", "wn") and run.lr > 0.1:
            variances = (0.5, 2.0, 3e7, 4e20)
            return DemoResult(None, 4, "features.16", variances, f"{run.row} is shifted.", gradients)
        return DemoResult(
            0.975, None, None, (0.5, 0.6), "It is healthy.", {"features.0": 0.0} if run.row == "pws" else gradients
        )

    what, none, pws, why, control = sentences({run: result(run) for run in all_runs()})
    assert "none (NaN @ step 4) and wn (NaN @ step 4) collapsed, while gn (97.5 %), bn (97.5 %) and pws" in what
    assert none == "none at 1: none is shifted."
    assert pws == "pws at 1: It is healthy."
    assert "squared average gradient was 7 to 41 times that of independent gradients with none" in why
    assert "and 0 with pws" in why
    assert "none with the same bound gave 97.5 %" in control


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--epochs=1", f"--out={tmp_path / 'demo'}"]) == 0
    shown = capsys.readouterr().out
    assert "NaN @ step" in shown
    assert "In the first step, before anything went wrong" in " ".join(shown.split())
    runs = json.loads((tmp_path / "demo" / "demo.json").read_text())["runs"]
    collapsed = [run for run in runs if run["collapse_step"] is not None]
    assert collapsed
    for run in collapsed:
        page = tmp_path / "demo" / f"{run['row']}-{run['lr']:g}.html".replace(", ", "-").replace(" ", "-")
        assert str(page) in shown.replace("\n", "")
        assert html.escape(run["verdict"].split(".")[0]) in page.read_text()
    report = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert len(report["runs"]) == 18
    assert report["story"][0] in " ".join((tmp_path / "demo" / "demo.txt").read_text().replace("1. ", "").split())
    assert (tmp_path / "demo" / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_bad_epochs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--epochs=0"]) == 2
    assert "--epochs must be at least 1" in capsys.readouterr().err
