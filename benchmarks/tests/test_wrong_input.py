"""Bad input to `python -m benchmarks`: one clear error each, exit code 2, nothing changed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from changed_files import contents, damage, structure
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from wrong_files import RESULTS, TEXTS, WRONG, changed

from benchmarks.__main__ import main
from benchmarks.speed import command as speed

pytestmark = pytest.mark.slow
SUITE: Final[dict[str, Any]] = {"rows": ["none", "pws"], "cases": [{"model": "stack4", "batch": 1, "pixels": 8}]}
PLACES: Final[list[tuple[Any, ...]]] = [
    *((key,) for key in ("rows", "cases", "title", "seconds", "processes")),
    *(("cases", 0, key) for key in ("model", "batch", "pixels", "width", "compile", "vary", "task")),
]
RIGHT: Final[dict[Any, list[Any]]] = {
    **{"title": ["word"], "seconds": [5, 0.5], "processes": [5]},
    **{"batch": [5, [1]], "pixels": [5, [1]], "width": [5, 0.5, [1], [None]], "compile": [True, [None]]},
    **{"vary": [[None]], "task": [[None]], "model": [{}, "word", ["a"]]},
}
"""What happens to be right at a place."""
CELL: Final = {"row": "bn", "column": "LR 0.1", "seed": 0, "accuracy": 0.5, "non_finite_step": None}
RESULT: Final = {
    "grid": "g",
    "target": 0.8,
    "settings": {},
    "rows": {"bn": {}},
    "columns": {"LR 0.1": {"optim.lr": 0.1}},
    "cells": [{**CELL, "steps_to_target": 1}],
}


@pytest.fixture(autouse=True)
def _no_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a suite that happens to be right would do takes minutes."""
    monkeypatch.setattr(speed, "run_suite", lambda *_: None)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2, arguments
    said = capsys.readouterr().err
    assert said.startswith("benchmarks: ")
    assert said.count("\n") == 1, said
    assert len(said) < 1500
    return said


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_text_that_is_no_suite(text: str | bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert str(path) in refused(capsys, "speed", str(path), f"--out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", PLACES, ids=lambda place: str(place[-1]))
def test_a_value_that_does_not_belong_in_a_suite(
    place: tuple[Any, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    tried = 0
    for value in WRONG:
        if not any(type(value) is type(item) and value == item for item in RIGHT.get(place[-1], [])):
            path.write_text(yaml.safe_dump(changed(SUITE, place, value)))
            refused(capsys, "speed", str(path), f"--out={tmp_path / 'out'}")
            tried += 1
    assert tried > 5
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", RESULTS.values(), ids=RESULTS)
def test_a_table_of_a_damaged_result(content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(content))
    kinds = (
        ("mine range",)
        if isinstance(content, dict) and content.get("columns") == {}
        else ("mine", "mine: bn", "mine steps")
    )
    for marker in kinds:
        (tmp_path / "page.md").write_text(f"<!-- table {marker} -->\n<!-- end -->\n")
        assert "mine.json" in refused(capsys, "tables", str(tmp_path / "page.md"), f"--results={tmp_path}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["shift", "--out="], "must not be empty"),
        (["speed", "resnet50", "--out="], "must not be empty"),
        (["accuracy", "", "--quick"], "must not be empty"),
        (["accuracy", "collapse", "--quick", "--jobs=100000"], "--jobs must be"),
        (["accuracy", "collapse", "--jobs=0"], "--jobs must be"),
        (["convert", "--jobs=100000"], "--jobs must be"),
        (["shift", "--out=page.md"], "--out must be a folder"),
        (["tables", "none.md"], "none.md"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").write_text("mine")
    assert words in refused(capsys, *arguments)
    assert contents(tmp_path) == {"page.md": b"mine"}


@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        (["depth", "--quick", "--out=mine"], "depth.json"),
        (["cost", "--quick", "--out=mine"], "cost.json"),
        (["accuracy", "collapse", "--quick", "--out=mine"], "collapse.json"),
        (["forecast", "--quick", "--out=mine"], "forecast.json"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_nothing_of_others_is_overwritten(
    arguments: list[str],
    file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / file).write_text("mine")
    assert str(Path("mine")) in refused(capsys, *arguments)
    assert contents(tmp_path) == {f"mine/{file}": b"mine"}


def test_a_suite_leaves_the_file_of_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    (tmp_path / "resnet50.json").write_text("mine")
    assert str(tmp_path) in refused(capsys, "speed", "resnet50", "--quick", f"--out={tmp_path}")
    assert contents(tmp_path) == {"resnet50.json": b"mine"}


COMMANDS: Final[dict[tuple[str, ...], list[str]]] = {
    ("speed", "suite.yaml", "--out=out"): ["suite.yaml"],
    ("tables", "page.md", "--results=results"): ["page.md", "results/grid.json"],
}
"""Each command with the files that it reads."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    (folder / "suite.yaml").write_text(yaml.safe_dump({**SUITE, "seconds": 0.1}))
    (folder / "results").mkdir()
    (folder / "results" / "grid.json").write_text(json.dumps(RESULT))
    (folder / "page.md").write_text("<!-- table grid: bn -->\n<!-- end -->\n<!-- table grid steps -->\n<!-- end -->\n")
    return folder


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_commands_are_right_before_they_are_changed(
    command: tuple[str, ...], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    assert main(command) == 0


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_generated_input(
    data: st.DataObject, base: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = data.draw(st.sampled_from(sorted(COMMANDS)))
    folder = tmp_path_factory.mktemp("case") / "here"
    shutil.copytree(base, folder)
    path = folder / data.draw(st.sampled_from(COMMANDS[arguments]))
    change = structure if path.suffix in (".yaml", ".json") and data.draw(st.booleans()) else damage
    change(data.draw, path)
    before, here = contents(folder), Path.cwd()
    capsys.readouterr()
    os.chdir(folder)
    try:
        code = main(arguments)
    finally:
        os.chdir(here)
    said = capsys.readouterr().err
    assert code in (0, 2), (arguments, said)
    assert said.count("\n") == bool(code), said
    if code:
        assert said.startswith("benchmarks: "), (arguments, said)
        assert contents(folder) == before, arguments
    shutil.rmtree(folder)
