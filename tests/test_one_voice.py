"""Bad input of a run of several processes that torchrun or srun started: one message, all end with exit code 2."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import free_port
from small_runs import ONE_THREAD, arguments
from test_cluster_environment import PLACES, SLURM

TWO = ("--trainer.devices=2", "--trainer.max_steps=1")
# Each case: the flags of both processes, those of the second one alone, and what the only message says.
CASES = {
    "both": (("--data.batch_size=3",), (), "batch"),
    "first": ((), (), "exists, and nothing in it is overwritten"),
    "second": ((), ("--data.name=npz", "--data.root=missing.npz"), "missing.npz"),
}
Ended = list[tuple[int, str]]


def by_torchrun(folder: Path, flags: tuple[str, ...], second: tuple[str, ...]) -> Ended:
    """Exit codes and messages; torchrun itself ends with 1 and tells which process failed first."""
    script = folder / "train.py"
    script.write_text(
        "import os, sys\nfrom pws.cli import main\n"
        f"code = main(sys.argv[1:] + (os.environ['RANK'] == '1') * {list(second)})\n"
        f"open(r'{folder}/code' + os.environ['RANK'], 'w').write(str(code))\nsys.exit(code)\n"
    )
    where = ("--nproc-per-node=2", f"--master-port={free_port()}", "--redirects=3", f"--log-dir={folder / 'logs'}")
    torchrun = (sys.executable, "-m", "torch.distributed.run", *where, str(script), *arguments(folder / "run", *flags))
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=240, env=ONE_THREAD)
    assert done.returncode == 1
    logs = sorted((folder / "logs").glob("*/*/*/stderr.log"))
    return [(int((folder / f"code{rank}").read_text()), log.read_text()) for rank, log in enumerate(logs)]


def by_srun(folder: Path, flags: tuple[str, ...], second: tuple[str, ...]) -> Ended:
    tasks = []
    for place, more in zip(PLACES["slurm"], ((), second), strict=False):
        command = [sys.executable, "-m", "pws", *arguments(folder / "run", *flags, *more)]
        node = {**SLURM, "SLURM_NTASKS": "2", "SLURM_NNODES": "1", **place}
        tasks.append(subprocess.Popen(command, env={**ONE_THREAD, **node}, stderr=subprocess.PIPE, text=True))
    said = [task.communicate(timeout=240)[1] for task in tasks]
    return [(task.returncode, text) for task, text in zip(tasks, said, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "case"), [(by_torchrun, "both"), (by_torchrun, "second"), (by_srun, "first")])
def test_one_message_and_no_process_that_waits(
    launcher: Callable[[Path, tuple[str, ...], tuple[str, ...]], Ended], case: str, tmp_path: Path
) -> None:
    flags, second, message = CASES[case]
    if case == "first":
        (tmp_path / "run").mkdir()
    ended = launcher(tmp_path, (*TWO, *flags), second)
    assert [code for code, _ in ended] == [2, 2], ended
    speaker = case == "second"
    assert message in ended[speaker][1]
    assert [text.count("pws: ") for _, text in ended] == [1 - speaker, speaker], ended
    assert "Traceback" not in ended[0][1] + ended[1][1]
    assert (tmp_path / "run").exists() == (case == "first")
