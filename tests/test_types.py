"""A type checker sees what the public names take: each marked line is an error, and no other is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import torch
import pws
from torch import nn

images = torch.ones(2, 3, 8, 8)
conv: nn.Module = pws.Conv2d(3, 8, 3, stride=(1, 2), padding="same", gain=1.0)
pws.Conv1d(3, 8, kernel_size=3, bias=False, device="cpu", dtype=torch.float64, relative_gamma=True)
pws.Conv3d(3, 8, (3, 3, 3), padding_mode="circular")
pws.ConvTranspose2d(3, 8, 3, 2, output_padding=1, gamma=0.1)
pws.Linear(3, 8, False, gain="linear")
pws.diagnose(conv, (images, images), nn.functional.mse_loss, lr=0.1, forward=lambda model, batch: model(batch[0]))
pws.convert(conv, images, calibrate=False, keep="layer1.*", warm_start=True, form="layers")
pws.fold(pws.Plan.load("plan.json").apply(conv), like=conv)
pws.training.ClipGrad(0.1)
labels: list[int] = [int(label) for label in pws.load("runs/a", "last", device="cpu").predict(images)]
pws.optim.SGD(conv, lr=0.1, step_bound=None)

pws.Conv1d(3, 8)  # wrong
pws.Conv2d(3, 8)  # wrong
pws.Conv3d(3, 8)  # wrong
pws.ConvTranspose1d(3, 8)  # wrong
pws.ConvTranspose2d(3, 8)  # wrong
pws.ConvTranspose3d(3, 8)  # wrong
pws.Linear(3)  # wrong
pws.Conv2d(3, 8, 3, gian=1.0)  # wrong
pws.ConvTranspose2d(3, 8, 3, relativ_gamma=True)  # wrong
pws.Linear(3, 8, gama=0.1)  # wrong
pws.Conv2d(3, 8, "3")  # wrong
pws.Conv2d(3, 8, 3, gain=None)  # wrong
pws.ConvTranspose2d(3, 8, 3, padding="same")  # wrong
pws.Linear(3, 8, 1, 2, 3, 4)  # wrong
pws.mark(nn.Linear(3, 8), gian=1.0)  # wrong
pws.standardize(images, gama=0.1)  # wrong
pws.calibrate(conv, images, taget=2.0)  # wrong
pws.convert(conv, images, calibrat=False)  # wrong
pws.plan(conv, images, warmstart=True)  # wrong
pws.fold(conv, lik=conv)  # wrong
pws.diagnose(conv, images, rate=0.1)  # wrong
pws.forecast(conv, [images, images], proggress=print)  # wrong
pws.Monitor(conv, evry=50)  # wrong
pws.Monitor(conv, every=1.5)  # wrong
pws.clip_grad(conv)  # wrong
pws.optim.SGD(conv, 0.1, stepbound=None)  # wrong
pws.load("runs/a", devise="cpu")  # wrong
pws.trainning  # wrong
pws.training.ClipGard()  # wrong
"""


def test_mistakes_in_calls_are_errors_of_the_type_checker(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    options = [
        "--strict",
        "--follow-imports=silent",
        "--ignore-missing-imports",
        "--config-file=",
        "--no-error-summary",
    ]
    cache = f"--cache-dir={root / '.mypy_cache' / 'calls'}"
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, cache, str(file)],
        env={"MYPYPATH": str(root / "src"), "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    found = {int(line) for line in re.findall(r"program\.py:(\d+): error", done.stdout)}
    wanted = {number for number, line in enumerate(PROGRAM.splitlines(), 1) if line.endswith("# wrong")}
    assert found == wanted, done.stdout + done.stderr
