"""`python -m benchmarks`: each experiment runs and says what it measured; the pieces it measures with."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from opacus.grad_sample import GradSampleHooksFastGradientClipping
from torch import nn

import pws
from benchmarks.__main__ import COMMANDS, main
from benchmarks.samplers import QUICK_CASES, ROWS, check_parity
from benchmarks.tables import fill_tables
from benchmarks.theory import forecast as forecasts
from benchmarks.theory.centring import CentreGradient
from benchmarks.theory.divergence import Network, diverges, smallest_diverging_lr
from benchmarks.theory.forecast import summary
from benchmarks.theory.initial import diagnose_initial, span
from benchmarks.theory.watched import MOST_POINTS, WatchedRun, shift_shares, train_watched
from pws.diagnosis import diagnose
from pws.methods import build_method
from pws.models import build_model
from pws.private import standardized_norm_sample

pytestmark = pytest.mark.slow

CENTRED = ("wn", "wn, gradient centred", "wn, output centred", "bn")


def bench(name: str, out: Path) -> dict[str, Any]:
    assert main([name, "--quick", f"--out={out}"]) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    result: dict[str, Any] = json.loads((out / f"{name}.json").read_text(), parse_constant=refuse)
    assert result["command"] == f"python -m benchmarks {name}"
    assert result["versions"]["torch"] == torch.__version__.split("+")[0]
    assert result["commit"]
    assert result["device"]
    picture = (out / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
    return result


def test_all_commands_are_tested() -> None:
    experiments = [
        "initial",
        "shift",
        "centred",
        "depth",
        "forecast",
        "cost",
        "stream",
        "scale",
        "private",
        "samplers",
        "warm-start",
    ]
    assert sorted(COMMANDS) == sorted([*experiments, "accuracy", "speed", "convert", "make-trainable", "tables"])


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_commands_are_listed_with_their_time(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for name in COMMANDS:
        (line,) = (line for line in shown.splitlines() if line.startswith(f"  {name} "))
        assert re.search(r"(seconds|minutes?|hour|minutes on two cores|quarter of an hour|half an hour)\)$", line), line
    assert "Example: python -m benchmarks accuracy collapse --jobs 2" in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: python -m benchmarks {name} ")
    assert f"Example: python -m benchmarks {name}" in shown


@pytest.mark.parametrize(
    ("name", "cells", "steps"),
    [
        ("shift", [("none", 0.3), ("wn", 0.3), ("bn", 0.3), ("pws", 0.3)], [0, 1, 2, 4]),
        ("centred", [(m, lr) for lr in (0.05, 0.3) for m in CENTRED], [0, 1, 2, 4]),
        ("depth", [("none", 0.3), ("wn", 0.3), ("bn", 0.3), ("pws", 0.3)], [0, 1, 2, 4, 5]),
    ],
)
def test_experiments(
    name: str, cells: list[tuple[str, float]], steps: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = bench(name, tmp_path / "new" / "folder")
    assert [(run["method"], run["lr"]) for run in result["runs"]] == cells
    assert result["dataset"] == "digits"
    for run in result["runs"]:
        assert run["verdict"]
        if run["collapsed_at"] is None:
            assert run["steps"] == steps[-1] + (4 if name != "depth" else 1)
            assert run["non_finite_step"] is None
        if name != "depth":
            assert run["losses"][-1][0] == (run["non_finite_step"] or run["steps"]) - 1
            assert all(loss > 0 for _, loss in run["losses"])
        if name == "shift" and run["collapsed_at"] is None:
            assert [step for step, _ in run["shift_share"]] == steps
        if name == "shift" and run["method"] == "pws":
            assert max(share for _, share in run["shift_share"]) < 1e-6
        if name == "depth":
            assert [len(variances) for variances in run["variances"].values()] == [len(run["layers"])] * 2 == [10, 10]
            assert next(iter(run["variances"])) == "0"
    printed = capsys.readouterr().out
    assert f"Files: {tmp_path / 'new' / 'folder' / name}.json" in printed
    assert all(f"{method}, LR {lr:g}: " in printed for method, lr in cells)


def test_a_streamed_epoch_keeps_its_memory(tmp_path: Path) -> None:
    result = bench("stream", tmp_path)
    assert (result["images"], result["shards"], len(set(result["orders"].values()))) == (3000, 3, 4)
    memory = result["epochs"]["0 workers"]["memory_mib"]
    assert len(memory) > 10
    assert max(memory) < 1.05 * min(memory)


def test_two_processes_hold_half_each(tmp_path: Path) -> None:
    result = bench("scale", tmp_path)
    one, two = result["memory_mib"]["1"], result["memory_mib"]["2"]
    network = build_model("cifar-resnet18", build_method("bn"))
    weights = sum(p.numel() for p in build_model("cifar-resnet18", build_method("pws")).parameters())
    assert one["weights"] == one["gradients"] == pytest.approx(4 * weights / 2**20, rel=1e-3)
    assert all(two[part] == pytest.approx(one[part] / 2, rel=0.01) for part in one)
    layers = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert result["exchanged"]["SyncBatchNorm"]["collectives"] == 2 * len(layers)
    assert result["exchanged"]["PWS, FSDP2"]["collectives"] == 1


def test_samplers_are_timed_beside_opacus(tmp_path: Path) -> None:
    modes = bench("samplers", tmp_path)["samplers"]["2 convolutions"]
    assert {mode: list(rows) for mode, rows in modes.items()} == {mode: list(rows) for mode, rows in ROWS.items()}
    assert all(rows["Conv2d, Opacus"]["ratio"] == [1, 1, 1] for rows in modes.values())
    assert all(cost["peak"] > 0 for rows in modes.values() for cost in rows.values())
    text = "<!-- table samplers ghost -->\n<!-- end -->\n"
    assert "| 2 convolutions | 1.00, " in fill_tables(text, tmp_path)


def test_samplers_go_on_where_they_were_interrupted(tmp_path: Path) -> None:
    first, *_ = QUICK_CASES.items()
    both = {"first": first[1], "second": first[1]}
    with patch.dict(QUICK_CASES, both, clear=True):
        whole = bench("samplers", tmp_path)
        stored = {"first": whole["samplers"]["first"]}
        (tmp_path / "samplers.json").write_text(json.dumps({**whole, "samplers": stored}))
        resumed = bench("samplers", tmp_path)["samplers"]
        assert resumed["first"] == stored["first"]
        assert list(resumed) == ["first", "second"]
        assert bench("samplers", tmp_path)["samplers"]["first"] != stored["first"], "a whole result is measured anew"


def test_a_sampler_that_finds_other_norms_is_not_timed() -> None:
    wrong = {pws.Conv2d: lambda *given: {p: 2 * n for p, n in standardized_norm_sample(*given).items()}}
    with patch.dict(GradSampleHooksFastGradientClipping.NORM_SAMPLERS, wrong), pytest.raises(AssertionError):
        check_parity(QUICK_CASES["2 convolutions"], "ghost")


def test_a_watched_run_measures_all_layers() -> None:
    run = train_watched("pws", 0.3, 6, 5, "digits")
    assert [d.step for d in run.diagnoses] == [0, 1, 2, 4, 5]
    assert {len(d.layers) for d in run.diagnoses} == {10}
    assert max(layer.shift_share for layer in run.diagnoses[-1].layers) < 1e-6
    assert [step for step, _ in shift_shares(run.diagnoses)] == [0, 1, 2, 4, 5]
    assert (len(run.losses), run.non_finite_step, run.to_dict()["steps"]) == (6, None, 6)


def test_a_loss_curve_is_smoothed_and_thinned() -> None:
    losses: list[float | None] = [float(step) for step in range(301)]
    run = WatchedRun("bn", 0.1, losses, [], "", None)
    curve = dict(run.loss_curve())
    assert list(curve)[:11] == [*range(10), 12]
    assert len(curve) <= MOST_POINTS + 10
    assert curve[300] == pytest.approx(295.5)  # the mean of the last ten
    assert max(curve) == 300
    assert run.to_dict()["final_loss"] == pytest.approx(290.5)  # of the last twenty
    broken = WatchedRun("bn", 0.1, [3.0, 1.0, None], [], "", None)
    assert (broken.loss_curve(), broken.non_finite_step) == ([(0, 3), (1, 2)], 2)


def test_initial(tmp_path: Path) -> None:
    rows = {row["method"]: row for row in bench("initial", tmp_path)["rows"]}
    assert list(rows) == ["none", "bn", "pws"]
    assert rows["pws"]["ratio"] == [0, 0]
    assert not rows["pws"]["critical_lr"]
    assert rows["none"]["ratio"][0] > 1.5
    assert rows["bn"]["expectation_share"][1] < 0.01 < rows["none"]["expectation_share"][1]
    assert 0 < rows["none"]["critical_lr"][0] <= rows["none"]["critical_lr"][1]


def test_cost(tmp_path: Path) -> None:
    result = bench("cost", tmp_path)
    (row,) = result["networks"].values()
    assert set(row["quartiles"]) == {"diagnosis", "measured", "watched"}
    assert all(low <= middle <= high and middle > 0 for low, middle, high in row["quartiles"].values())
    assert (row["rounds"], row["step_s"] > 0) == (2, True)
    assert row["diagnosis"] > 1
    # Of 1000 steps 20 multiples of 50 and ten powers of 2, 1 to 512, are measured.
    steps = [s for s in range(1000) if s % result["every"] == 0 or s & (s - 1) == 0]
    expected = sum(row["measured_step" if s in steps else "watched_step"] - 1 for s in range(1000)) / 1000
    assert row["monitor"] == pytest.approx(expected, abs=1e-4)  # of rounded ratios


def test_warm_start_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = bench("warm-start", tmp_path)
    (entry,) = result["networks"]
    assert entry["before"] > 30
    assert abs(entry["fitted on 1024"] - entry["before"]) < 30
    assert entry["output error, 1024"] > 0
    assert "| stack4 x 0.25 | 1200 | 6 | 0 |" in fill_tables("<!-- table warm-start -->\n<!-- end -->", tmp_path)
    monkeypatch.setattr(
        "benchmarks.convert.warm_start.convert_trained", lambda *_: pytest.fail("it was trained already")
    )
    assert bench("warm-start", tmp_path)["networks"] == result["networks"]


def test_make_trainable_keeps_what_the_fix_of_opacus_loses(tmp_path: Path) -> None:
    (row,) = bench("make-trainable", tmp_path)["trained_networks"]
    trained = row["trained, with BatchNorm"]
    assert trained > 60
    assert row["make_trainable, images"] > trained - 5
    assert row["ModuleValidator.fix"] < trained - 30
    assert "| stack4 x 0.25 | 1200 | 6 | 0 |" in fill_tables("<!-- table make-trainable -->\n<!-- end -->", tmp_path)


def test_the_forecast_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = bench("forecast", tmp_path)
    ((name, cell),) = result["networks"].items()
    assert cell["diverging_lr"] is None  # in five steps it gets no better than a guess at any rate
    assert cell["probed"]
    assert all(lr > 0 for lr in cell["forecasts"])
    assert cell["held_out"] is False

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("computed again")

    for function in ("diverges", "forecast", "diagnose", "prepare"):
        monkeypatch.setattr(forecasts, function, never)
    result["networks"][name]["diverging_lr"] = 0.123
    (tmp_path / "forecast.json").write_text(json.dumps(result))
    assert bench("forecast", tmp_path)["networks"] == {name: {**cell, "diverging_lr": 0.123}}
    # What is missing is computed, and only that.
    del result["networks"][name]["forecasts"]
    (tmp_path / "forecast.json").write_text(json.dumps(result))
    with pytest.raises(AssertionError, match="computed again"):
        main(["forecast", "--quick", f"--out={tmp_path}"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["shfit"], "unknown benchmark 'shfit'; did you mean shift"),
        (["shift", "--fast"], "fast"),
    ],
)
def test_bad_input(arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, f"--out={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmarks: ")
    assert told in error
    assert error.count("\n") == 1
    assert not any(tmp_path.iterdir())


# --- Pieces ---


@pytest.mark.parametrize("ratio", [1.05, 1.2, 4])
@pytest.mark.parametrize("at", [2e-5, 0.003, 0.1, 0.1001, 7.0, 9000.0])
def test_the_smallest_diverging_rate_of_a_known_threshold(at: float, ratio: float) -> None:
    asked: list[float] = []

    def probe(lr: float) -> bool:
        asked.append(lr)
        return lr >= at

    found, probed = smallest_diverging_lr(probe, ratio=ratio)
    assert at / ratio**0.5 <= found * 1.0001
    assert found <= at * ratio**0.5 * 1.0001
    assert probed == {lr: lr >= at for lr in asked}
    assert len(asked) == len(set(asked)), "each rate costs 200 training steps"
    assert asked[0] == 0.1


@pytest.mark.parametrize(("answer", "expected"), [(True, 0.0), (False, math.inf)])
def test_a_network_that_always_or_never_diverges(answer: bool, expected: float) -> None:
    found, probed = smallest_diverging_lr(lambda _: answer)
    assert found == expected
    assert set(probed.values()) == {answer}


@pytest.mark.parametrize(("lr", "steps", "expected"), [(1e9, 4, True), (0.1, 40, False), (1e-9, 10, True)])
def test_what_counts_as_divergence(lr: float, steps: int, expected: bool) -> None:
    # The last one learns nothing, which is no better than a guess.
    assert diverges(Network("stack4", "bn", 0.1, 64), lr, steps, dataset="digits") is expected


@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (6, 3), (2, 5, 7)])
def test_centre_gradient(shape: tuple[int, ...]) -> None:
    signal = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape, dtype=torch.float64) + 2
    out = CentreGradient()(signal)
    assert torch.equal(out, signal)
    (gradient,) = torch.autograd.grad((out * weight).sum(), signal)
    dims = [d for d in range(len(shape)) if d != 1]
    assert gradient.mean(dims).abs().max() < 1e-14
    torch.testing.assert_close(weight - gradient, weight.mean(dims, keepdim=True).expand(shape))


def test_centre_gradient_takes_the_expectation_part() -> None:
    torch.manual_seed(0)
    batch = torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    head = [nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)]
    parts = [
        diagnose(nn.Sequential(nn.Conv2d(1, 4, 3), *middle, *head), batch, nn.functional.cross_entropy).layers[0]
        for middle in ([], [CentreGradient()])
    ]
    assert (parts[0].expectation_share or 0) > 0.01
    assert parts[1].expectation_share is not None
    assert parts[1].expectation_share < 1e-8


def cell(truth: float, one_step: float | None, *predicted: float, held_out: bool = False) -> dict[str, Any]:
    return {"diverging_lr": truth, "one_step": one_step, "forecasts": list(predicted), "held_out": held_out}


def rows(*cells: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    found = summary({str(number): cell for number, cell in enumerate(cells)})
    return {(row["what"].split(" ")[0], row["networks"]): row for row in found}


def test_summary_of_a_table() -> None:
    found = rows(
        cell(0.1, 5.0, 0.1, 0.1, 0.5),
        cell(0.2, 4.0, 0.3, 0.2, 0.2),
        cell(0.4, 3.0, 0.8, 0.4, 0.1),
        cell(0.8, None, 0.9, 0.8, 0.8),
    )
    everything = {what: row for (what, networks), row in found.items() if networks == "all networks"}
    assert {row["count"] for row in everything.values()} == {4}
    first, median, worst, one = (everything[what] for what in ("forecast", "median", "worst", "one-step"))
    assert (first["rank_correlation"], first["largest_factor"]) == (pytest.approx(1), pytest.approx(2))
    assert (median["rank_correlation"], median["largest_factor"]) == (pytest.approx(1), pytest.approx(1))
    # The worst of each network: 0.5, 0.3, 0.1, 0.9 for 0.1, 0.2, 0.4, 0.8: ranks 3, 2, 1, 4 for 1, 2, 3, 4.
    assert worst["rank_correlation"] == pytest.approx(1 - 6 * (4 + 0 + 4 + 0) / (4 * 15))
    assert worst["largest_factor"] == pytest.approx(5)
    # 5, 4, 3 and none, which ranks highest: ranks 3, 2, 1, 4.
    assert one["rank_correlation"] == pytest.approx(0.2)
    assert (one["largest_factor"], one["missing"]) == (pytest.approx(50), 1)
    assert ("forecast", "held-out networks") not in found


def test_summary_by_groups() -> None:
    known = [cell(0.1 * 2**n, 1.0, 0.1 * 2**n) for n in range(3)]
    held_out = [cell(0.1 * 2**n, 1.0, 0.1 / 2**n, held_out=True) for n in range(3)]
    found = rows(*known, *held_out, {"held_out": False, "diverging_lr": 3.0})  # the last is not predicted yet
    ranks = {networks: row["rank_correlation"] for (what, networks), row in found.items() if what == "median"}
    assert ranks["networks it was chosen on"] == pytest.approx(1)
    assert ranks["held-out networks"] == pytest.approx(-1)
    assert found["median", "all networks"]["count"] == 6
    # A prediction that is the same for all has no rank.
    assert found["one-step", "all networks"]["rank_correlation"] is None


def test_summary_of_nothing() -> None:
    empty: Callable[..., Any] = rows
    assert empty() == {}
    assert empty(cell(0.1, 1.0, 0.1)) == {}


def test_networks_at_initialization_are_as_the_theory_says() -> None:
    """The [m] lines of the paper's page (one seed there): ratio times n, the part of E[delta], the smallest critical rate."""
    found = {method: span([diagnose_initial(method, seed=0)]) for method in ("none", "bn", "pws")}
    low, high = found["none"]["ratio"]
    assert 60 < low < high < 300
    assert found["none"]["expectation_share"][0] > 0.6
    assert found["bn"]["ratio"][1] < 80
    assert found["bn"]["expectation_share"][1] < 1e-6
    assert found["pws"]["ratio"] == [0, 0]
    assert found["pws"]["critical_lr"] is None
    assert 0.02 < found["none"]["critical_lr"][0] < 0.5
    assert 1 < found["bn"]["critical_lr"][0] < 8
