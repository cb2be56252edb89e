"""Runs that SLURM or torchrun starts: Lightning finds its place in them, and the first process alone owns the folder."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.utilities import rank_zero
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only

from pws.training import Recipe
from pws.training.callbacks import is_first_process
from pws.training.run_folder import claimed

# The second of two nodes with two processes each, or the first.
SLURM = {
    "SLURM_JOB_ID": str(10_000 + os.getpid() % 10_000),  # whose last digits tell the port
    "SLURM_JOB_NAME": "pws",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NNODES": "2",
    "SLURM_NODELIST": "localhost",
}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
ADDRESS = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}
PLACES = {
    "slurm": [{"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n % 2), "SLURM_NODEID": str(n // 2)} for n in range(4)],
    "torchrun": [{"RANK": str(n), "LOCAL_RANK": str(n % 2), "GROUP_RANK": str(n // 2)} for n in range(4)],
}
KINDS = {"slurm": (SLURM, SLURMEnvironment), "torchrun": (TORCHRUN | ADDRESS, TorchElasticEnvironment)}


def started(patch: pytest.MonkeyPatch, launcher: str, rank: int) -> None:
    """As if Lightning were imported by this process of the launcher; undone after the test."""
    for name, value in {**KINDS[launcher][0], **PLACES[launcher][rank]}.items():
        patch.setenv(name, value)
    patch.delattr(rank_zero_only, "rank")
    importlib.reload(rank_zero)


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("launcher", KINDS)
def test_the_first_process_of_all_nodes_makes_the_folder(
    launcher: str, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(monkeypatch, launcher, rank)
    assert is_first_process() == (rank == 0)
    with claimed(tmp_path / "run", Recipe(), resume=False):
        assert (tmp_path / "run").exists() == (rank == 0)
    trainer = Trainer(accelerator="cpu", devices=2, num_nodes=2, strategy="ddp", logger=False)
    assert type(trainer.strategy.cluster_environment) is KINDS[launcher][1]  # type: ignore[attr-defined]
    assert (trainer.global_rank, trainer.local_rank, trainer.world_size) == (rank, rank % 2, 4)
    assert is_first_process() == (rank == 0)


@pytest.mark.slow
def test_two_processes_of_srun_train_one_run(tmp_path: Path) -> None:
    flags = ("--data.name=digits", "--data.image_size=16", "--model.width=0.1", "--trainer.max_steps=2")
    here = ("--trainer.accelerator=cpu", "--trainer.devices=2", f"--runs={tmp_path}", "--name=run")
    command = [sys.executable, "-m", "pws", "train", "fashion-mnist-allconv-pws", *flags, *here]
    node = {**SLURM, "SLURM_NTASKS": "2", "SLURM_NNODES": "1", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    tasks = [subprocess.Popen(command, env={**os.environ, **node, **place}, **pipes) for place in PLACES["slurm"][:2]]
    said = [task.communicate(timeout=240) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert [out.count("training allconv") for out, _ in said] == [1, 0]
    assert (tmp_path / "run" / "summary.json").is_file()
