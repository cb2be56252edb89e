"""Several processes, by DDP and FSDP2, train as one that was never stopped."""

from __future__ import annotations

import csv
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import free_port, processes, run_forked, wait
from shared_runs import CLASSIFIER, DETECTOR, assert_same_end, command, last, noise, one_process
from small_runs import ONE_THREAD

from pws.training import train
from pws.training.checkpoints import LAST

pytestmark = pytest.mark.slow
LOST = "another process of the run ended"


@pytest.fixture(scope="module", name="noise")
def images_of_noise(tmp_path_factory: pytest.TempPathFactory) -> str:
    return noise(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    ("task", "devices", "strategy"),
    [("classify", 4, "ddp"), ("classify", 4, "fsdp2"), ("detect", 4, "ddp"), ("detect", 2, "fsdp2")],
)
def test_several_processes_train_as_one(tmp_path: Path, noise: str, task: str, devices: int, strategy: str) -> None:
    settings = (*CLASSIFIER, noise) if task == "classify" else DETECTOR
    train(one_process(*settings), tmp_path / "one", quiet=True)
    own = command(tmp_path / "several", *settings, f"--trainer.devices={devices}", f"--trainer.strategy={strategy}")
    run_forked(devices, free_port(), tmp_path / "several", own[3:])
    assert_same_end(tmp_path / "several", tmp_path / "one")
    found, wanted = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("several", "one"))
    assert found["train_loss"] == pytest.approx(wanted["train_loss"], rel=1e-6)
    assert found["metrics"].keys() == wanted["metrics"].keys()
    for name, value in wanted["metrics"].items():
        assert found["metrics"][name] == (value if value is None else pytest.approx(value, rel=1e-6)), name


def test_ten_kills_at_random_moments(tmp_path: Path, noise: str) -> None:
    """One of two processes dies ten times, of DDP and of FSDP2 in turn: no batch is lost or trained twice."""
    settings = (*CLASSIFIER, noise, "--trainer.epochs=40")
    train(one_process(*settings), tmp_path / "whole", quiet=True)
    draw, folder = random.Random(0), tmp_path / "killed"
    noticed = 0
    for number in range(10):
        strategy = f"--trainer.strategy={('ddp', 'fsdp2')[number % 2]}"
        resume = ["--resume"] if number else []
        own = command(folder, *settings, "--trainer.devices=2", strategy, *resume)[3:]
        noticed += kill_one_of_two(folder, own, number and draw.randint(0, 4), draw.uniform(0, 0.1))
    assert noticed >= 5
    assert 0 < last(folder)["global_step"] < last(tmp_path / "whole")["global_step"]
    train(one_process(*settings), folder, resume=True, quiet=True)
    assert_same_end(folder, tmp_path / "whole")
    rows = [list(csv.DictReader((run / "metrics.csv").open())) for run in (folder, tmp_path / "whole")]
    assert [row.keys() for row in rows[0]] == [row.keys() for row in rows[1]]
    for mine, other in zip(*rows, strict=True):
        assert {key: float(cell or "nan") for key, cell in mine.items()} == pytest.approx(
            {key: float(cell or "nan") for key, cell in other.items()}, rel=1e-6, nan_ok=True
        )


def kill_one_of_two(folder: Path, arguments: list[str], checkpoints: int, seconds: float) -> bool:
    """Start a run, and kill its second process so long behind so many checkpoints; whether the first one noticed."""
    log, newest = folder.with_suffix(".log"), folder / "checkpoints" / LAST
    log.unlink(missing_ok=True)
    with processes(2, free_port(), log, arguments) as ranks:

        def wait_for(what: Callable[[], object]) -> None:
            end = time.monotonic() + 100
            while not what():
                assert time.monotonic() < end, log.read_text()
                assert ranks[0].is_alive(), log.read_text()
                time.sleep(0.005)

        wait_for(lambda: log.exists() and " allconv with pws " in log.read_text())
        for _ in range(checkpoints):
            before = written(newest)
            wait_for(lambda before=before: written(newest) not in (None, before))
        time.sleep(seconds)
        ranks[1].kill()
        wait(ranks, 5)
        if LOST in log.read_text():  # it is about to end
            wait(ranks, 60)
        # The first one waits for it where they have not met yet, until the launcher ends it too.
        assert ranks[0].exitcode in (2, None), log.read_text()
        assert ranks[1].exitcode == -signal.SIGKILL, log.read_text()
        noticed = LOST in log.read_text()
        assert noticed == (ranks[0].exitcode == 2), log.read_text()
        assert not noticed or "--resume goes on" in log.read_text()
        return noticed


def written(path: Path) -> int | None:
    """When, in ns."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def test_two_nodes_of_torchrun(tmp_path: Path, noise: str) -> None:
    settings = (*CLASSIFIER, noise)
    train(one_process(*settings), tmp_path / "one", quiet=True)
    own = command(
        tmp_path / "nodes", *settings, "--trainer.devices=1", "--trainer.num_nodes=2", "--trainer.strategy=fsdp2"
    )
    where = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *where]
    nodes = [
        subprocess.Popen(
            [*torchrun, f"--node-rank={rank}", *own[1:]], stderr=subprocess.PIPE, text=True, env=ONE_THREAD
        )
        for rank in range(2)
    ]
    for node in nodes:
        _, said = node.communicate(timeout=300)
        assert node.returncode == 0, said
    assert_same_end(tmp_path / "nodes", tmp_path / "one")
