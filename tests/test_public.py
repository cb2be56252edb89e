"""The public names, and what `import pws` may not do."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

import pws


def fresh(code: str) -> Any:
    """What `code` prints as JSON in a new process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", pws.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(pws, name) is not None


def test_public_names_are_those_of_the_design_and_no_others() -> None:
    layers = {f"Conv{kind}{d}d" for kind in ("", "Transpose") for d in (1, 2, 3)} | {"Linear"}
    assert {"standardize", "calibrate", "param_groups", "variance_preserving_gain", *layers} <= set(pws.__all__)
    assert len(pws.__all__) == len(set(pws.__all__))
    names = {name for name in vars(pws) if not name.startswith("_") and f"pws.{name}" not in sys.modules}
    assert names <= set(pws.__all__)


def test_errors_are_value_errors() -> None:
    assert issubclass(pws.ShapeError, pws.PwsError)
    assert issubclass(pws.PwsError, ValueError)


@cache
def modules(imported: str) -> frozenset[str]:
    """The modules of a new process after `import` of a comma-separated list."""
    return frozenset(fresh(f"import {imported}, json, sys; print(json.dumps(sorted(sys.modules)))"))


def test_import_needs_torch_alone() -> None:
    """Nothing beyond the standard library, torch and what torch itself imports."""
    added = modules("torch, pws") - modules("torch")
    assert {"pws", "pws._layers", "pws._standardize"} <= added
    assert not {name for name in added if name.partition(".")[0] not in {"pws", "torch", *sys.stdlib_module_names}}


def test_import_of_the_core_leaves_the_upper_rooms_shut() -> None:
    names = modules("torch, pws")
    assert not {"timm", "lightning", "rich", "jsonargparse", "torchvision", "sklearn", "matplotlib"} & names
    assert not {"pws.methods", "pws.models", "pws.training", "pws.cli"} & names


STATE = """
import json, locale, logging, os, random, signal, sys, warnings
import torch

def state():
    return {
        "default dtype": str(torch.get_default_dtype()), "default device": str(torch.get_default_device()),
        "random": [hash(str(random.getstate())), torch.get_rng_state().tolist()],
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "warnings": [str(entry) for entry in warnings.filters],
        "logging": [logging.root.level, len(logging.root.handlers), logging.root.manager.disable],
        "gradient": torch.is_grad_enabled(), "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(), "cudnn": torch.backends.cudnn.benchmark,
        "environment": dict(os.environ), "path": sys.path, "locale": locale.setlocale(locale.LC_ALL),
        "hooks": [str(sys.excepthook), str(sys.displayhook), str(signal.getsignal(signal.SIGINT))],
        "print options": str(vars(torch._tensor_str.PRINT_OPTS)),
    }

before = json.dumps(state())
{action}
after = json.dumps(state())
print(json.dumps([before, after]))
"""


def test_import_changes_no_global_state() -> None:
    before, after = fresh(STATE.replace("{action}", "import pws"))
    assert json.loads(before) == json.loads(after)


def test_a_change_of_global_state_would_be_seen() -> None:
    before, after = fresh(
        STATE.replace("{action}", "import pws; warnings.simplefilter('ignore'); torch.manual_seed(1)")
    )
    changed = {key for key, value in json.loads(before).items() if json.loads(after)[key] != value}
    assert changed == {"warnings", "random"}


def test_the_training_room_opens_when_it_is_asked_for() -> None:
    code = """
import json, sys, pws
before = "lightning" in sys.modules, hasattr(pws, "trainning")
print(json.dumps([*before, pws.training.ClipGrad.__name__, pws.training is sys.modules["pws.training"]]))
"""
    assert fresh(code) == [False, False, "ClipGrad", True]
