"""`python -m benchmarks speed`: suites, what is timed, and the files. Times themselves are never asserted."""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import pws
from benchmarks.__main__ import main
from benchmarks.speed.networks import FormulaConv2d, kernels_of, network, optimizer_of
from benchmarks.speed.step_alone import step_alone
from benchmarks.speed.steps import build_step
from benchmarks.speed.suite import SUITES, Case, load_suite
from pws._errors import PwsError
from pws.bench import timing
from pws.bench.timers import TimerHere
from pws.bench.timing import ROUNDS, Timing, measure_rounds

pytestmark = pytest.mark.slow
TINY = """
title: tiny
rows: [none, pws, pws in backward]
seconds: 0.1
processes: 1
cases:
  - {model: stack4, batch: 2, pixels: 16, width: 0.125, optimizer: [sgd, sgd-fused]}
  - {model: stack4, batch: 2, pixels: 16, width: 0.125, task: inference}
"""


def test_the_shipped_suites() -> None:
    assert list(SUITES) == [
        "detection",
        "gpu-compiled",
        "gpu",
        "models",
        "modes",
        "processes",
        "resnet50-224",
        "resnet50",
        "scaling",
        "small",
    ]
    assert [len(load_suite(name).cases) for name in SUITES] == [4, 3, 3, 6, 3, 1, 2, 5, 20, 4]
    for name in SUITES:
        assert 1 <= len(load_suite(name, quick=True).cases) <= 2


@pytest.mark.parametrize("row", ["none", "bn", "gn", "wn", "nf", "formula", "pws", "pws layers"])
@pytest.mark.parametrize("model", ["torchvision:resnet18", "timm:regnety_002"])
def test_a_network_of_others_with_each_method(model: str, row: str) -> None:
    built = network(model, row)
    count = sum(isinstance(m, nn.BatchNorm2d) for m in built.modules())
    assert (count > 0) == (row == "bn")
    assert bool(pws.marked(built)) == (row == "pws")
    assert any(isinstance(m, pws.Conv2d) for m in built.modules()) == (row == "pws layers")
    assert built(torch.randn(2, 3, 32, 32)).shape == (2, 1000)


def test_the_formula_is_the_papers() -> None:
    layer, ours = FormulaConv2d(4, 6, 3), pws.Conv2d(4, 6, 3, gain=pws.PAPER_GAIN)
    ours.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(layer(x), ours(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("row", ["pws", "pws layers", "pws in backward", "pws reference"])
def test_each_way_of_pws_starts_as_the_same_network_and_trains(row: str) -> None:
    model, x = network("stack4", row, 0.125), torch.randn(2, 3, 16, 16)
    wanted = network("stack4", "pws", 0.125)(x)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    optimizer = optimizer_of(row, model, fused=True)
    assert isinstance(optimizer, torch.optim.SGD if row == "pws layers" else pws.optim.SGD)
    with kernels_of(row):
        model(x).square().mean().backward()
        assert all((p.grad is None) == (row == "pws in backward") for p in model.parameters())
        optimizer.step()
    assert not torch.equal(model(x), wanted)


@pytest.mark.parametrize("fused", [True, False])
def test_the_rows_without_a_step_of_their_own_take_torchs_sgd_as_it_comes_or_fused(fused: bool) -> None:
    optimizer = optimizer_of("bn", network("stack4", "bn", 0.125), fused=fused)
    assert type(optimizer) is torch.optim.SGD
    assert bool(optimizer.defaults["fused"]) == fused


@pytest.mark.parametrize("task", ["train", "inference"])
@pytest.mark.parametrize("row", ["none", "bn", "frozen-bn", "gn", "ws", "nf", "pws"])
def test_a_detector_with_each_method(row: str, task: str) -> None:
    case = Case("mask-rcnn-resnet18", batch=2, pixels=64, width=0.125, task=task)
    step = build_step(case, row)
    count = sum(isinstance(m, nn.BatchNorm2d) for m in step.model.modules())
    assert (count > 0) == (row == "bn")
    assert bool(pws.marked(step.model)) == (row == "pws" and task == "train")  # folded in inference
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    step.run()
    moved = {name for name, value in step.model.state_dict().items() if not torch.equal(value, before[name])}
    assert bool(moved) == (task == "train")
    assert not moved or any(name.startswith("roi_heads.mask_predictor") for name in moved)


def timings(case: Case, rows: tuple[str, ...]) -> dict[str, Timing]:
    timers = {row: TimerHere(partial(build_step, case, row)) for row in rows}
    return measure_rounds(str(case), timers, 0.01, lambda _: None)


def test_what_is_kept_for_the_backward_pass() -> None:
    case = Case("stack4", batch=4, pixels=16, width=0.25)
    rows = ("none", "bn", "pws", "pws layers", "pws in backward")
    measured = timings(case, rows)
    outputs = 0

    def count(_: nn.Module, __: object, output: torch.Tensor) -> None:
        nonlocal outputs
        outputs += output.numel() * output.element_size()

    plain = network("stack4", "none", 0.25)
    for module in plain.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(count)
    images = torch.randn(4, 3, 16, 16)
    plain(images)
    kept = outputs + 4 * images.numel()
    assert kept <= measured["none"].kept < 1.2 * kept  # and the features, the logits, their softmax
    assert measured["bn"].kept == pytest.approx(measured["none"].kept + outputs, rel=0.02)  # its inputs too
    assert measured["pws"].kept == measured["pws in backward"].kept == measured["none"].kept
    kernels = 4 * sum(p.numel() for p in plain.parameters() if p.dim() > 1)
    assert measured["pws layers"].kept == pytest.approx(measured["none"].kept + kernels, rel=0.1)  # and scales


def test_the_peak_of_a_step() -> None:
    case = Case("stack4", batch=2, pixels=8, width=0.25)  # of small images: gradients are most of it
    measured = timings(case, ("none", "pws", "pws in backward"))
    gradients = 4 * sum(p.numel() for p in network("stack4", "none", 0.25).parameters())
    for row in ("none", "pws"):
        assert gradients < measured[row].peak < gradients + 4 * measured[row].kept
    assert measured["pws"].peak == pytest.approx(measured["none"].peak, rel=0.02)
    assert measured["pws in backward"].peak < 0.9 * measured["none"].peak


def test_a_suite_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Processes take seconds to start; tests/test_speed.py is about them.
    monkeypatch.setattr(
        timing, "timers_of", lambda builders: nullcontext({row: TimerHere(build) for row, build in builders.items()})
    )
    (tmp_path / "tiny.yaml").write_text(TINY)
    arguments = ["speed", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path)]
    assert main(arguments) == 0
    first = json.loads((tmp_path / "tiny.json").read_text())
    assert [case["case"] for case in first["cases"]] == [
        "stack4 x 0.125, batch 2, 16 px",
        "stack4 x 0.125, batch 2, 16 px, fused SGD",
        "stack4 x 0.125, batch 2, 16 px, inference",
    ]
    assert list(first["cases"][2]["rows"]) == ["none", "pws"]
    assert first["cases"][0]["rows"]["none"]["ratio"] == [1, 1, 1]
    (tmp_path / "tiny.json").write_text(json.dumps({**first, "cases": first["cases"][1:]}))
    assert main(arguments) == 0
    second = json.loads((tmp_path / "tiny.json").read_text())
    assert second["cases"][1:] == first["cases"][1:]
    assert second["cases"][0] != first["cases"][0]
    (tmp_path / "tiny.yaml").write_text(TINY.replace("[none,", "[none, gn,").replace("processes: 1", "processes: 2"))
    assert main(arguments) == 0
    third = json.loads((tmp_path / "tiny.json").read_text())
    # A row that is new is measured, with all that it stands beside.
    assert all("gn" in case["rows"] for case in third["cases"])
    rows = [row for case in third["cases"] for row in case["rows"].values()]
    assert all(row["rounds"] >= 2 * ROUNDS[0] and row["seconds"] > 0 for row in rows)
    assert all(low <= middle <= high for low, middle, high in (row["ratio"] for row in rows))
    assert "3/3" in capsys.readouterr().out
    assert "inference" in (tmp_path / "tiny.md").read_text()
    assert (tmp_path / "tiny.png").stat().st_size > 10_000


def test_the_step_alone() -> None:
    found = step_alone("stack4", 0.125, 2)
    assert 0 < found["deviation"] < 1e-4
    assert found["bytes"] == 4 * sum(p.numel() for p in network("stack4", "none", 0.125).parameters())
    ways = found["ways"]
    assert {name: way["streams"] for name, way in ways.items()} == {
        "copy": 2,
        "torch SGD": 8,
        "torch SGD, fused": 5,
        "pws SGD": 8,
    }
    assert found["rounds"] == 2
    assert ways["copy"]["copies"] == (1, 1, 1)
    assert all(way["seconds"] > 0 and way["copies"][1] > 0 for way in ways.values())


@pytest.mark.parametrize("wrong", [{"momentum": 0.89}, {"step_bound": 0.99}, {"lr": 0.0999}, {"weight_decay": 0.01}])
def test_a_wrong_step_is_not_timed(wrong: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    right = pws.optim.SGD
    monkeypatch.setattr(pws.optim, "SGD", lambda model, **settings: right(model, **{**settings, **wrong}))
    with pytest.raises(PwsError, match="deviates from float64"):
        step_alone("stack4", 0.125, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rows: [none]", "missing: cases"),
        ("rows: [bn]\ncases: [{model: stack4, batch: 1, pixels: 8}]", "the first row must be none"),
        ("rows: [none, bnn]\ncases: [{model: stack4, batch: 1, pixels: 8}]", "did you mean bn"),
        ("rows: [none]\ncases: [{model: stack4, batch: 1, pixel: 8}]", "did you mean pixels"),
        ("rows: [none]\ncases: [{model: stack4, batch: 1}]", "missing: pixels"),
        ("rows: [none]\ncases: [{model: stack4, batch: 1, pixels: 8, task: trian}]", "did you mean train"),
        ("rows: [none]\ncases: [{model: stack4, batch: 1, pixels: 8, optimizer: adam}]", "unknown optimizer"),
        (
            "rows: [none]\nprocesses: 0\ncases: [{model: stack4, batch: 1, pixels: 8}]",
            "processes must be at least 1",
        ),
        (
            "rows: [none]\nseconds: x\ncases: [{model: stack4, batch: 1, pixels: 8}]",
            "seconds: Expected a float. Got value: x",
        ),
        (
            "rows: [none]\nseconds: .nan\ncases: [{model: stack4, batch: 1, pixels: 8}]",
            "seconds must be positive; got nan",
        ),
        (
            "rows: [none]\nprocesses: true\ncases: [{model: stack4, batch: 1, pixels: 8}]",
            "processes: Expected a int. Got value: True",
        ),
        (
            "rows: [none, formula]\ncases: [{model: ssd-vgg16, batch: 1, pixels: 64}]",
            "row for the detector ssd-vgg16",
        ),
        (
            "rows: [none]\ncases: [{model: ssd-vgg16, batch: 1, pixels: 64, channels_last: true}]",
            "leave out channels_last",
        ),
        ("rows: [", "is not a YAML file"),
    ],
)
def test_a_wrong_suite_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    assert main(["speed", str(tmp_path / "wrong.yaml")]) == 2
    assert words in capsys.readouterr().err
