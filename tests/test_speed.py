"""`pws bench speed`: a model with its norms, without them and with pws. Times themselves are never asserted."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

import pws
from pws.bench import timing
from pws.bench.model_speed import AS_IT_IS, PWS, ROWS, TASKS, WITHOUT, build_step
from pws.bench.step_memory import peak_of
from pws.bench.timers import TimedStep, TimerHere
from pws.bench.timing import ROUNDS, Timing, costs, measure, ratio_text
from pws.cli import main

pytestmark = pytest.mark.slow
SPEC = "pws.models.small:resnet18"
MODEL = ("bench", "speed", f"--model={SPEC}", "--batch-size=2", "--image-size=16", "--seconds=0.1")


def test_the_peak_is_what_is_there_at_once() -> None:
    before = torch.zeros(1000)

    def run() -> None:
        first = torch.ones(3000)
        second = first[:2000] + before.sum()
        del first
        torch.ones(2500)
        del second
        torch.ones(4000)

    assert peak_of(run) == pytest.approx(4 * (3000 + 2000), rel=0.05)  # small things come with it


def test_the_quartiles_are_those_of_ratios_in_the_same_round() -> None:
    base, other = Timing((1.0, 2.0, 4.0, 8.0), 5, 6), Timing((1.0, 4.0, 12.0, 32.0), 7, 8)
    found = costs({"base": base, "other": other}, "base")
    assert found["base"].ratio == (1, 1, 1)
    assert found["other"].ratio == (1.25, 2.5, 3.75)  # of 1, 2, 3, 4
    assert (found["other"].seconds, found["other"].rounds) == (8, 4)
    assert (found["other"].kept, found["other"].peak) == (7, 8)
    assert ratio_text(found["other"].ratio) == "2.50 (1.25 to 3.75)"


@pytest.mark.parametrize("task", TASKS)
def test_the_rows_of_a_model(task: str) -> None:
    images = torch.randn(2, 3, 16, 16)
    for row in ROWS:
        step = build_step(SPEC, 2, 16, row, task)
        norms = sum(isinstance(module, nn.BatchNorm2d) for module in step.model.modules())
        assert (norms > 0) == (row == AS_IT_IS)
        assert bool(pws.marked(step.model)) == (row == PWS and task == "training step")
        before = [parameter.detach().clone() for parameter in step.model.parameters()]
        step.run()
        same = all(map(torch.equal, before, step.model.parameters()))
        assert same == (task == "inference")
        assert step.model(images).shape == (2, 10)


def test_without_norms_pws_starts_as_the_same_network() -> None:
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        plain, ours = (build_step(SPEC, 2, 16, row, "inference").model(images) for row in (WITHOUT, PWS))
    assert torch.equal(plain, ours)


def test_each_row_has_a_process_of_its_own_as_often_as_it_says() -> None:
    said: list[str] = []
    builders = {row: Builder(row) for row in ("a", "b")}
    found = measure("case", builders, 0.1, 2, said.append)
    assert sum("warms up" in text for text in said) == 4
    assert all(len(timing.seconds) >= 2 * ROUNDS[0] for timing in found.values())


class Builder:
    def __init__(self, row: str) -> None:
        self.row = row

    def __call__(self) -> TimedStep:
        model = nn.Linear(2, 2)

        def run() -> None:
            model(torch.ones(1, 2))

        return TimedStep(run, model)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # Processes take seconds to start; that they serve is tested above.
    monkeypatch.setattr(
        timing, "timers_of", lambda builders: nullcontext({row: TimerHere(build) for row, build in builders.items()})
    )
    assert main([*MODEL, f"--out={tmp_path}"]) == 0
    result = json.loads((tmp_path / "speed.json").read_text())
    assert {task: list(rows) for task, rows in result["tasks"].items()} == {task: list(ROWS) for task in TASKS}
    assert result["command"] == f"pws bench speed --model {SPEC} --batch-size 2 --image-size 16"
    assert result["versions"]["torch"] == torch.__version__.split("+")[0]
    for rows in result["tasks"].values():
        assert rows[WITHOUT]["ratio"] == [1, 1, 1]
        assert all(low <= middle <= high for low, middle, high in (row["ratio"] for row in rows.values()))
    training = result["tasks"]["training step"]
    assert training[PWS]["kept"] == training[WITHOUT]["kept"] < training[AS_IT_IS]["kept"]
    printed = capsys.readouterr().out
    assert all(printed.count(f"{row} ") == len(TASKS) for row in (AS_IT_IS, "│ pws"))
    assert all(f"│ {task} " in printed for task in TASKS)
    assert f"Files: {tmp_path}" in printed
    assert main([*MODEL, f"--out={tmp_path}"]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model=timm:resnet19"], "did you mean"),
        ([f"--model={SPEC}", "--batch-size=0"], "--batch-size must be at least 1; got 0"),
        ([f"--model={SPEC}", "--image-size=-1"], "--image-size must be at least 1; got -1"),
        ([f"--model={SPEC}", "--seconds=0"], "--seconds must be positive"),
        ([f"--model={SPEC}", "--seconds=nan"], "Got value: nan"),
        ([], "model"),
        (["resnet50"], "resnet50"),
    ],
)
def test_bad_input(flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "speed", *flags, f"--out={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("pws: ")
    assert words in said
    assert said.count("\n") == 1, said
    assert not (tmp_path / "out").exists()
