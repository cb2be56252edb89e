"""Every example runs from start to end, and prints what it promises."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Final

import pytest

from pws.cli.process import process_as_found

FOLDER: Final = Path(__file__).parents[1] / "examples"
# Name to what it prints: each pattern's numbers are percentages, which are at least those bounds.
PRINTED: Final[dict[str, list[tuple[str, tuple[float, ...]]]]] = {
    "plain_loop": [(r"epoch 5: loss [\d.]+, test accuracy ([\d.]+) %", (90,))],
    "lightning_module": [(r"test accuracy ([\d.]+) %", (85,))],
    "own_training": [
        (r"epoch 5/5  loss", ()),
        (r"test accuracy ([\d.]+) %, of the network loaded again ([\d.]+) %", (90, 90)),
    ],
    "timm_model": [
        (r"layer1.0.bn1 +BatchNorm2d +remove +behind layer1.0.conv1", ()),
        (r"norms left: 0\n", ()),
        (r"test accuracy ([\d.]+) % with batches of 4 images", (70,)),
    ],
    "warm_start": [
        (r"pretrained, with BatchNorm: test accuracy ([\d.]+) %", (90,)),
        (r"warm start: outputs differ by [\d.]+ % of their deviation", ()),
        (r"converted, not trained yet: test accuracy ([\d.]+) %", (85,)),
        (r"fine-tuned for an epoch: test accuracy ([\d.]+) %", (90,)),
    ],
    "own_optimizer": [
        (r"test accuracy ([\d.]+) %", (80,)),
        (r"largest mean of a filter of the first layer: (?:\de-0[789]|0e\+00)\n", ()),
    ],
    "private": [
        (r"pretrained on public images, with BatchNorm: test accuracy ([\d.]+) %", (70,)),
        (r"warm start: outputs differ by [\d.]+ % of their deviation", ()),
        (r"made trainable: test accuracy ([\d.]+) %", (68,)),
        (r"two epochs with epsilon (?:7\.9|8\.0)\d: test accuracy ([\d.]+) %", (80,)),
    ],
    "federated": [(r"average of 5 clients after 10 rounds: test accuracy ([\d.]+) %", (95,))],
    "export_onnx": [(r"digits.onnx: test accuracy ([\d.]+) %, logits within \de-0[4-9] of the model's", (80,))],
    "collapse": [
        (r"none +[\d.a-z %]+ (?:stuck|NaN)\n", ()),
        (r"bn +([\d.]+) % +([\d.]+) %\n", (85, 85)),
        (r"pws +([\d.]+) % +([\d.]+) %\n", (85, 85)),
    ],
}


def test_there_are_ten_and_each_has_a_line_in_the_readme() -> None:
    scripts = {path.stem for path in FOLDER.glob("*.py")}
    assert scripts == set(PRINTED)
    assert len(scripts) == 10
    lines = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\) \| \S", lines, re.MULTILINE)) == scripts


@pytest.mark.parametrize("name", PRINTED)
@pytest.mark.filterwarnings("ignore")  # exporters and Lightning warn of themselves
def test_it_prints_what_it_promises(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with process_as_found():
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    for pattern, bounds in PRINTED[name]:
        found = re.search(pattern, printed)
        assert found, (pattern, printed)
        for value, bound in zip(found.groups(), bounds, strict=True):
            assert float(value) >= bound, found[0]
