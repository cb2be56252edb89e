"""`pws bench`: which benches there are, and where the others went."""

from __future__ import annotations

import pytest

from pws.cli import main

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["shift"], "unknown bench 'shift'. Valid: accuracy, loader, speed"),
        (["tables", "README.md"], "unknown bench 'tables'. Valid: accuracy, loader, speed"),
        (["sped"], "unknown bench 'sped'; did you mean speed? Valid: accuracy, loader, speed"),
        ([], "needs a name. Valid: accuracy, loader, speed"),
    ],
)
def test_what_is_no_bench(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pws: ")
    assert told in error
    assert "python -m benchmarks" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["-h"]])
def test_the_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "pws bench accuracy grid.yaml" in shown
    assert "pws bench speed --model timm:resnet18" in shown
    assert "pws bench loader RECIPE" in shown
    assert "python -m benchmarks" in shown
