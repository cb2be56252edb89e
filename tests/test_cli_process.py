"""A command leaves the process as it found it, whether it ends well or not: tests and notebooks go on in it."""

from __future__ import annotations

import logging
import os
import random
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from pws import cli

GLOBALS: dict[str, Callable[[], object]] = {
    "threads": torch.get_num_threads,
    "torch's random numbers": lambda: torch.get_rng_state().tolist(),
    "Python's random numbers": random.getstate,
    "numpy's random numbers": lambda: str(np.random.get_state()),
    "warning filters": lambda: list(warnings.filters),
    "log levels": lambda: [logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")],
    "environment": lambda: {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"},
    "error hook": lambda: threading.excepthook,
}


def state() -> dict[str, object]:
    return {name: read() for name, read in GLOBALS.items()}


def change_all(_: list[str]) -> int:
    before = state()
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    warnings.simplefilter("error")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ["PWS_TEST_SETS_THIS"] = "1"
    os.environ.pop("HOME", None)
    threading.excepthook = print
    after = state()
    assert [name for name in GLOBALS if before[name] == after[name]] == []
    return 0


def change_all_and_fail(arguments: list[str]) -> int:
    change_all(arguments)
    raise cli.PwsError("it failed.")


@pytest.mark.parametrize(("command", "code"), [(change_all, 0), (change_all_and_fail, 2)])
def test_what_a_command_sets_is_set_back(
    command: Callable[[list[str]], int], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("pws.cli.evaluate")
    module.run = command  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pws.cli.evaluate", module)
    monkeypatch.setenv("HOME", "here")
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    before = state()
    assert cli.main(["evaluate"]) == code
    assert state() == before


def test_a_training_run_leaves_no_trace(tmp_path: Path) -> None:
    before = state()
    flags = ["--data.image_size=12", "--data.train_images=32", "--data.batch_size=32", "--trainer.epochs=1"]
    recipe = ["fashion-mnist-allconv-pws", "--data.name=digits", "--model.width=0.05", "--trainer.accelerator=cpu"]
    assert cli.main(["train", *recipe, *flags, f"--runs={tmp_path}"]) == 0
    assert state() == before


def test_the_demo_leaves_the_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pws.cli import demo

    seen: list[int] = []
    monkeypatch.setattr(demo, "_demo", lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    assert cli.main(["demo", f"--out={tmp_path}"]) == 0
    assert (before, seen, torch.get_num_threads()) == (1, [2], 1)
