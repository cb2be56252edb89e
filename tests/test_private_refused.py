"""Private runs that can't be: each is one clear error, and leaves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_private import NOISY, TINY, Points, network, settings
from small_runs import arguments
from torch import nn

import pws
from pws.cli import main
from pws.training import fit

WRONG = {
    "task": ("--task=detect", "task"),
    "mixup": ("--data.mixup_alpha=0.2", "data.mixup_alpha"),
    "cutmix": ("--data.cutmix_alpha=0.2", "data.cutmix_alpha"),
    "clip_norm": ("--optim.clip_norm=1", "privacy.clip_norm"),
    "accumulate": ("--trainer.accumulate=2", "physical_batch_size"),
    "compile": ("--trainer.compile=true", "trainer.compile"),
    "activations": ("--trainer.checkpoint_activations=true", "checkpoint_activations"),
    "half": ("--trainer.precision=16-mixed", "bf16-mixed"),
    "processes": ("--trainer.devices=2", "one process"),
    "sharded": ("--trainer.strategy=fsdp2", "one process"),
    "both": ("--privacy.epsilon=1", "give one"),
    "delta": ("--privacy.delta=0.01", "1 / 128"),
    "clip": ("--privacy.clip_norm=0", "positive"),
    "copies": ("--privacy.augmentations=4", "no augmentation"),
    "batch": ("--data.batch_size=200", "128"),
    "bn": ("--model.method=bn", "mix the images of a batch"),
    "gc": ("--model.method=gc", "gc would be none"),
    "ghost": ("--privacy.mode=ghost --trainer.precision=bf16-mixed", "rounds in different ways"),
    "monitor": ("--monitor=1", "--monitor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_impossible_setting_is_one_clear_error(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flag, said = WRONG[name]
    assert main(arguments(tmp_path / "run", *TINY, *NOISY, *flag.split())) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_a_frozen_batch_norm_is_refused_too(kind: type[nn.BatchNorm1d], affine: bool, tmp_path: Path) -> None:
    """It mixes the images of a batch, whether it is trained or not, and Opacus looks at trained modules alone."""
    model = nn.Sequential(nn.Linear(4, 8), kind(8, affine=affine).requires_grad_(False), nn.Linear(8, 3)).double()
    with pytest.raises(pws.PwsError, match="leaves 1 modules that mix the images of a batch"):
        fit(model, Points(40), Points(8), settings(), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_trained_module_with_buffers_is_refused(tmp_path: Path) -> None:
    model = network()
    model[0].register_buffer("seen", torch.zeros(1))
    with pytest.raises(pws.PwsError, match="has trained parameters beside the buffers seen"):
        fit(model, Points(40), Points(8), settings(), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_an_epsilon_that_no_noise_gives_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(tmp_path / "run", *TINY, "--privacy.epsilon=0.0001", "--privacy.delta=1e-9")) == 2
    assert "larger epsilon" in capsys.readouterr().err
