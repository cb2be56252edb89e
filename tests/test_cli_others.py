"""Models of others: their errors are shown with their own lines of code, then one line of ours; exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from pws.cli import main

THEIRS = """
import sys
import torch
from torch import nn

def good(num_classes=10, in_channels=1):
    end = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *end)

def exits(num_classes=10, in_channels=1):
    sys.exit(5)

def meta(num_classes=10, in_channels=1):
    with torch.device("meta"):
        return good(num_classes, in_channels)

def few(in_channels=1):
    return good(3, in_channels)

def frozen(num_classes=10, in_channels=1):
    return good(num_classes, in_channels).requires_grad_(False)

class Raises(nn.Module):
    def __init__(self, num_classes=10, in_channels=1):
        super().__init__()
        self.net = good(num_classes, in_channels)

    def forward(self, x):
        return self.helper(x)

    def helper(self, x):
        raise KeyError("no such feature")

class Later(Raises):
    def helper(self, x):
        if self.training:
            raise KeyError("later")
        return self.net(x)

class Exits(Raises):
    def helper(self, x):
        sys.exit(9)

class Greedy(Raises):
    def helper(self, x):
        return torch.empty(1 << 45)

class Tuple(Raises):
    def helper(self, x):
        return (self.net(x), 1) if self.training else self.net(x)

class Words(Raises):
    def helper(self, x):
        return {"a": str(self.net(x).sum())}
"""
TRAIN = (
    *("train", "fashion-mnist-allconv-bn", "--model.width=1", "--data.name=digits", "--data.train_images=64"),
    *("--data.batch_size=32", "--trainer.epochs=1", "--trainer.accelerator=cpu", "--runs=runs", "--model.name=SPEC"),
)
COMMANDS = {
    "train": TRAIN,
    "diagnose": ("diagnose", "--model=SPEC", "--data=digits", "--batch-size=8"),
    "convert": ("convert", "--model=SPEC", "--image-size=8", "--batch-size=4", "--out=out"),
}
SAYS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "exits": ("it called exit(5)", ("in exits: sys.exit(5)",), tuple(COMMANDS)),
    "meta": ("on the meta device", (), tuple(COMMANDS)),
    "few": ("classes", (), ("train", "diagnose")),
    "frozen": ("", (), ("train", "diagnose")),
    "Raises": ("KeyError: 'no such feature'", ("in forward: return", "in helper: raise KeyError"), tuple(COMMANDS)),
    "Later": ("KeyError: 'later'", ("in forward: return", "in helper: raise KeyError"), tuple(COMMANDS)),
    "Exits": ("it called exit(9)", ("in forward: return", "in helper: sys.exit(9)"), tuple(COMMANDS)),
    "Greedy": ("memory ran out", ("in forward: return", "in helper: return torch.empty"), tuple(COMMANDS)),
    "Tuple": ("returned tuple", (), ("train",)),
    "Words": ("", (), ("train", "diagnose")),
}


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"theirs_{abs(hash(tmp_path))}"
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / f"{name}.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(tmp_path / "code")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return name


@pytest.mark.parametrize(("factory", "command"), [(f, c) for f, (_, _, commands) in SAYS.items() for c in commands])
def test_their_frames_then_our_line(
    factory: str, command: str, theirs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words, frames, _ = SAYS[factory]
    assert main([part.replace("SPEC", f"{theirs}:{factory}") for part in COMMANDS[command]]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(frames) + 1, lines
    for line, frame in zip(lines, frames, strict=False):
        assert line.startswith('  File "')
        assert f"{theirs}.py" in line
        assert frame in line
    assert lines[-1].startswith("pws: ")
    assert words in lines[-1]
    assert [path for path in Path().rglob("*") if path.name != "runs"] == [], "what fails leaves nothing behind"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_without_fault(command: str, theirs: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([part.replace("SPEC", f"{theirs}:good") for part in COMMANDS[command]]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("import sys; sys.exit(3)", "it called exit(3)"),
        ("x = 1 / 0", "ZeroDivisionError"),
        ("def (", "SyntaxError"),
    ],
)
def test_a_module_that_fails_when_it_is_imported(
    source: str, words: str, theirs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "code" / f"{theirs}_broken.py").write_text(source)
    assert main(["diagnose", f"--model={theirs}_broken:f"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert words in lines[-1]
    assert len(lines) == (1 if "SyntaxError" in words else 2)
