"""A SLURM of one machine: jobs are processes in the background, their states files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SBATCH = """#!/bin/bash
state=$(dirname "$0")/state; mkdir -p "$state"
last=$(grep -oP '(?<=--array=0-)[0-9]+' "$1")
id=$((100 + $(ls "$state" | wc -l)))
cp "$1" "$state/$id.sh"
start() {  # in a process group of its own, which scancel ends
    set -m; (SLURM_JOB_ID=$id SLURM_NTASKS=1 SLURM_PROCID=0 "${@:2}"; echo COMPLETED >"$state/$1") >/dev/null 2>&1 &
    echo $! >"$state/$1.pid"
}
if [ -z "$last" ]; then start "$id" bash "$state/$id.sh"; fi
for index in ${last:+$(seq 0 "$last")}; do
    start "${id}_$index" env SLURM_ARRAY_JOB_ID=$id SLURM_ARRAY_TASK_ID=$index bash "$state/$id.sh"
done
echo "Submitted batch job $id"
"""
SRUN = """#!/bin/bash
fill() { n=${1//%A/$SLURM_ARRAY_JOB_ID}; n=${n//%a/$SLURM_ARRAY_TASK_ID}; n=${n//%j/$SLURM_JOB_ID}; echo "${n//%t/0}"; }
while [[ $1 == --* ]]; do
    case $1 in --output) out=$(fill "$2"); shift 2;; --error) err=$(fill "$2"); shift 2;; *) shift;; esac
done
exec "$@" >>"$out" 2>>"$err"
"""
SACCT = """#!/bin/bash
cd "$(dirname "$0")/state"
echo 'JobID|State|NodeList'
for pid in *.pid; do job=${pid%.pid}; echo "$job|$([ -f "$job" ] && cat "$job" || echo RUNNING)|node"; done
"""
SCANCEL = """#!/bin/bash
state=$(dirname "$0")/state; echo CANCELLED >"$state/$1"; kill -9 -- -$(cat "$state/$1.pid")
"""


def install(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Put the commands on the PATH; returns the folder of the submitted scripts."""
    folder.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT, "scancel": SCANCEL}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    patch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder / "state"
