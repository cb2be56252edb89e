"""`python -m benchmarks convert`: models of others, converted and checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.convert.models import SPECS

pytestmark = pytest.mark.slow


def test_the_matrix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", "--only", "timm:mobilenetv3_small_100", "--jobs", "1", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert "1 of 1 models passed all checks" in capsys.readouterr().out
    assert "| timm:mobilenetv3_small_100 | 2.54 M | 34 | 34 | 0 |" in (tmp_path / "convert.md").read_text()
    assert len(SPECS) == len(set(SPECS))
    assert sum(spec.startswith("timm:") for spec in SPECS) >= 60
    assert main(["convert", "--only", "nothing"]) == 2
    kept = json.loads((tmp_path / "convert.json").read_text())["models"]["timm:mobilenetv3_small_100"]
    assert (kept["standardized"], kept["removed"], kept["kept_norms"], len(kept["losses"])) == (34, 34, 0, 2)
    assert main(arguments) == 0  # and it is not done again
    assert capsys.readouterr().out.startswith("1 of 1 models passed all checks")
    other = "timm:resnet50"
    path = tmp_path / "convert.json"
    content = json.loads(path.read_text())
    content["models"] = {other: {**kept, "failures": ["made up"]}, **content["models"]}
    path.write_text(json.dumps(content))
    assert main(arguments) == 0  # and other models stay
    assert "1 of 2 models passed all checks" in capsys.readouterr().out
    assert set(json.loads(path.read_text())["models"]) == {other, "timm:mobilenetv3_small_100"}
