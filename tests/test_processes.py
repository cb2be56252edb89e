"""Work in processes of its own: whatever ends one of them is one failed task, and the others are done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pws._errors import PwsError, UnknownNameError
from pws.bench.processes import Failure, TaskError, Worker, each_apart, one_thread
from pws.cli import main

pytestmark = pytest.mark.slow
FACTORIES = """
import os, signal, sys
from torch import nn

def good(num_classes, in_channels):
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.ReLU(), *pooled)

def dies(num_classes, in_channels):
    os._exit(7)

def killed(num_classes, in_channels):
    os.kill(os.getpid(), signal.SIGKILL)

class Greedy(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.net, self.calls = good(num_classes, in_channels), 0

    def forward(self, images):
        if self.training:
            bytearray(1 << 60)
        return self.net(images)
"""
GRID = """
settings:
  model: {method: bn}
  data: {name: digits, train_images: 64, batch_size: 32}
  trainer: {max_steps: 2}
columns:
  - {model.name: "NAME:good", data.batch_size: 16}
  - {model.name: "NAME:FACTORY", data.batch_size: 16}
  - {model.name: "NAME:good", data.batch_size: 32}
rows:
  bn: {}
"""


def work(kind: str) -> str:
    if kind == "exit":
        os._exit(3)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "memory":
        bytearray(1 << 60)
    if kind == "error":
        raise KeyError("two\nlines")
    if kind == "sys.exit":
        sys.exit(4)
    return f"done {kind}"


def refuse(_: str) -> None:
    raise UnknownNameError("thing", "tabel", ["table"])


FAILURES = {
    "exit": "its process died (exit code 3)",
    "kill": "its process was killed, as the system does when memory runs out",
    "memory": "memory ran out (MemoryError)",
    "error": "KeyError: 'two\\nlines'",
    "sys.exit": "it called exit(4)",
}


@pytest.mark.parametrize("jobs", [1, 3])
def test_each_task_ends_in_its_own_way(jobs: int) -> None:
    tasks = {kind: (kind,) for kind in ("a", *FAILURES, "b", "c")}
    found = dict(each_apart(work, tasks, jobs))
    failures = {key: outcome.reason for key, outcome in found.items() if isinstance(outcome, Failure)}
    assert {key: reason.partition(" at File ")[0] for key, reason in failures.items()} == FAILURES
    assert "in work: raise KeyError" in failures["error"]
    assert {key: found[key] for key in "abc"} == {key: f"done {key}" for key in "abc"}


def test_what_is_wrong_with_the_input_ends_all() -> None:
    with pytest.raises(PwsError, match="unknown thing 'tabel'; did you mean table"):
        list(each_apart(refuse, {1: ("a",), 2: ("b",)}, 2))


def test_a_worker_serves_until_it_dies() -> None:
    worker = Worker(one_thread)
    assert [worker.call(work, kind) for kind in "ab"] == ["done a", "done b"]
    for _ in range(2):
        with pytest.raises(TaskError, match="exit code 3"):
            worker.call(work, "exit")
    assert not worker.alive
    worker.close()


KILLED = """
import os, signal, sys, time
from pws.bench.processes import Worker, one_thread
if __name__ == "__main__":
    worker = Worker(one_thread)
    print(worker.call(os.getpid), flush=True)
    worker.send(time.sleep, 600)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_ends_with_a_command_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    # Its output is closed when the last process that holds it is gone.
    done = subprocess.run([sys.executable, str(tmp_path / "killed.py")], capture_output=True, text=True, timeout=100)
    assert done.returncode == -signal.SIGKILL
    worker = int(done.stdout)
    assert not Path(f"/proc/{worker}").exists() or "Z (zombie)" in Path(f"/proc/{worker}/status").read_text()


@pytest.mark.parametrize(
    ("factory", "reason"),
    [("dies", "exit code 7"), ("killed", "its process was killed"), ("Greedy", "memory ran out")],
)
def test_a_grid_goes_on_without_the_cell_that_fails(factory: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "factories.py").write_text(FACTORIES)
    (tmp_path / "grid.yaml").write_text(GRID.replace("NAME", "factories").replace("FACTORY", factory))
    command = [sys.executable, "-m", "pws", "bench", "accuracy", "grid.yaml", "--jobs=1", "--out=out"]
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == 2
    assert done.stderr.startswith("pws: 1 of 3 cells failed, the others are stored; bn, ")
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert (tmp_path / "out" / "grid.json").read_text().count('"row": "bn"') == 2
    assert (tmp_path / "out" / "grid.md").is_file()


def test_no_process_is_left_behind(capfd: pytest.CaptureFixture[str]) -> None:
    tasks = each_apart(time.sleep, {1: (0,), 2: (60,)}, 2)
    assert next(tasks) == (1, None)
    started = time.perf_counter()
    tasks.close()  # type: ignore[attr-defined]
    assert time.perf_counter() - started < 10
    assert capfd.readouterr().err == ""


def test_jobs_below_one_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "grid.yaml").write_text(
        GRID.replace("NAME:FACTORY", "torchvision:resnet18").replace("NAME:good", "allconv")
    )
    assert main(["bench", "accuracy", str(tmp_path / "grid.yaml"), "--jobs=0"]) == 2
    assert "--jobs must be at least 1" in capsys.readouterr().err
