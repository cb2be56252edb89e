"""Checkpoints with a wrong inside: refused by every command that reads one, before anything is touched."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pws.cli import main
from pws.training import load_recipe, train
from pws.training.checkpoint_writers import CheckpointFiles
from pws.training.checkpoints import BEFORE, LAST, checksum_of

Damage = Callable[[Path], None]
FLAGS = (
    *("--data.name=digits", "--data.image_size=12", "--data.train_images=64", "--data.batch_size=32"),
    *("--model.width=0.08", "--trainer.accelerator=cpu", "--trainer.devices=1"),
)
FIRST = "model.features.0.weight"


def trained(folder: Path, *flags: str, epochs: int = 3) -> Path:
    train(load_recipe("fashion-mnist-allconv-pws", *FLAGS, f"--trainer.epochs={epochs}", *flags), folder, quiet=True)
    (folder / "summary.json").unlink()  # as if killed
    return folder


def without_stand_ins(folder: Path) -> None:
    """Leave the last checkpoint alone."""
    for name in ("best.ckpt", BEFORE):
        (folder / "checkpoints" / name).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one epoch: one to damage, others to take checkpoints from."""
    folder = tmp_path_factory.mktemp("runs")
    trained(folder / "run", epochs=1)
    for name, flag in (("bn", "model.method=bn"), ("none", "model.method=none"), ("adamw", "optim.name=adamw")):
        trained(folder / name, f"--{flag}", epochs=1)
    trained(folder / "wide", "--model.width=0.16", epochs=1)
    trained(folder / "seed", "--seed=1", epochs=1)
    return folder


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    shutil.copytree(runs / "run", tmp_path / "run")
    without_stand_ins(tmp_path / "run")
    for other in set(runs.iterdir()) - {runs / "run"}:
        (tmp_path / other.name).symlink_to(other)
    return tmp_path / "run"


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def content(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Store what `change` returns, or what it leaves."""

    def damage(path: Path) -> None:
        checkpoint = torch.load(path, weights_only=True)
        changed = change(checkpoint)
        torch.save(checkpoint if changed is None else changed, path)

    return damage


def weight(change: Callable[[Tensor], Any]) -> Damage:
    return content(lambda found: found["state_dict"].update({FIRST: change(found["state_dict"][FIRST])}))


def without(key: str) -> Damage:
    return content(lambda found: {k: v for k, v in found.items() if k != key})


def one_bit(path: Path) -> None:
    """Flip one bit of a weight where it lies in the file."""
    tensor = torch.load(path, weights_only=True)["state_dict"][FIRST]
    raw = bytearray(path.read_bytes())
    at = raw.index(tensor.contiguous().numpy().tobytes()[:64])
    raw[at + 13] ^= 1
    path.write_bytes(bytes(raw))


def from_run(name: str) -> Damage:
    """The last checkpoint of another run, which lies beside."""
    return lambda path: path.write_bytes((path.parents[2] / name / "checkpoints" / "last.ckpt").read_bytes())


EVERYWHERE: dict[str, tuple[Damage, str]] = {
    "a list": (content(lambda _: [1, 2]), "it holds a list"),
    "a number": (content(lambda _: 5), "it holds a int"),
    "a tensor": (content(lambda _: torch.ones(3)), "it holds a Tensor"),
    "nothing": (content(lambda _: {}), "state_dict must be a mapping; it has none"),
    "state dict None": (content(lambda found: {**found, "state_dict": None}), "state_dict must be a mapping"),
    "state dict a list": (content(lambda found: {**found, "state_dict": [1]}), "it holds a list"),
    "state dict empty": (content(lambda found: {**found, "state_dict": {}}), "it holds an empty dict"),
    "epoch a text": (content(lambda found: {**found, "epoch": "one"}), "epoch must be a whole number"),
    "step negative": (content(lambda found: {**found, "global_step": -1}), "global_step must be a whole number"),
    "text for a tensor": (weight(lambda _: "weights"), f"{FIRST} is a str, not a tensor"),
    "None for a tensor": (weight(lambda _: None), f"{FIRST} is a NoneType, not a tensor"),
    "complex weights": (weight(lambda w: w.to(torch.complex64)), f"{FIRST} is torch.complex64"),
    "whole weights": (weight(lambda w: w.long()), f"{FIRST} is torch.int64"),
    "sparse weights": (weight(lambda w: w.to_sparse()), f"{FIRST} is no plain tensor"),
    "weights without data": (weight(lambda w: w.to("meta")), f"{FIRST} is no plain tensor"),
    "another shape": (weight(lambda w: w[:1]), "the network's is"),
    "unknown key": (
        content(lambda found: found["state_dict"].update(more=torch.ones(1))),
        "more is not in the network",
    ),
    "missing key": (content(lambda found: found["state_dict"].__delitem__(FIRST)), f"{FIRST} is missing"),
    "another norm": (from_run("bn"), "another architecture"),
    "another width": (from_run("wide"), "another architecture"),
    "another method of equal shapes": (from_run("none"), "model.method is none there, pws here"),
    "weights changed": (weight(lambda w: w + 1e-7 * w), "does not match its checksum"),
    "weights NaN": (weight(lambda w: w * float("nan")), "does not match its checksum"),
    "another precision": (weight(lambda w: w.half()), "does not match its checksum"),
    "a bit in the file": (one_bit, "does not match its checksum"),
    "checksum of another": (content(lambda found: {**found, "checksum": "0" * 64}), "does not match its checksum"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-500]), "cut off"),
    "half": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "cut off"),
    "empty": (lambda path: path.write_bytes(b""), "cut off"),
    "zeros": (lambda path: path.write_bytes(bytes(path.stat().st_size)), "cut off"),
    "words": (lambda path: path.write_text("hello"), "cut off"),
}
ON_RESUME: dict[str, tuple[Damage, str]] = {
    **{
        f"no {key}": (without(key), f"{key} must be")
        for key in ("optimizer_states", "lr_schedulers", "loops", "callbacks")
    },
    "no optimizer": (content(lambda found: {**found, "optimizer_states": []}), "optimizer_states must be a list"),
    "no checksum": (without("checksum"), "checksum must be"),
    "optimizer state changed": (
        content(lambda found: found["optimizer_states"][0]["param_groups"][0].update(lr=7.0)),
        "does not match its checksum",
    ),
    "another optimizer": (from_run("adamw"), "optim.name is adamw there, sgd here"),
    "another seed": (from_run("seed"), "seed is 1 there, 0 here"),
}
READERS = {
    "resume": ["train", "--resume"],
    "evaluate": ["evaluate", "--checkpoint=last"],
    "export": ["export", "--checkpoint=last", "--format=safetensors"],
    "diagnose": ["diagnose", "--checkpoint=last"],
}


@pytest.mark.parametrize(
    ("reader", "damage", "words"),
    [
        *((reader, *case) for reader in READERS for case in EVERYWHERE.values()),
        *(("resume", *case) for case in ON_RESUME.values()),
    ],
    ids=[*(f"{reader}-{case}" for reader in READERS for case in EVERYWHERE), *(f"resume-{case}" for case in ON_RESUME)],
)
def test_a_wrong_checkpoint_is_refused_and_nothing_changes(
    reader: str, damage: Damage, words: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run / "checkpoints" / "last.ckpt")
    before = files(run)
    command, *flags = READERS[reader]
    assert main([command, str(run), *flags]) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert str(run / "checkpoints" / "last.ckpt") in printed.err
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert files(run) == before


def test_weights_of_another_program_need_no_checksum(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = run / "checkpoints" / "last.ckpt"
    mean = {k: v for k, v in torch.load(last, weights_only=True).items() if k in ("state_dict", "epoch", "global_step")}
    torch.save(mean, last)
    assert main(["evaluate", str(run), "--checkpoint=last"]) == 0
    assert "top-1" in capsys.readouterr().out


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a number": lambda c: c.update(epoch=4),
    "a key": lambda c: c.update(more=None),
    "a kind": lambda c: c.update(epoch=3.0),
    "a sign": lambda c: c["state_dict"]["w"].neg_(),
    "a bit": lambda c: c["state_dict"]["w"].view(torch.int32).bitwise_xor_(1),
    "a shape": lambda c: c["state_dict"].update(w=c["state_dict"]["w"].t()),
    "a dtype": lambda c: c["state_dict"].update(n=c["state_dict"]["n"].to(torch.uint8)),
    "an order": lambda c: c["lists"].reverse(),
    "a nesting": lambda c: c.update(lists=[1, [2, 3]]),
    "an end": lambda c: c.update(lists=[[1, 2, 3]]),
    "a name": lambda c: c["state_dict"].update(v=c["state_dict"].pop("w")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_checksum_sees_every_change(change: Callable[[dict[str, Any]], Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    checkpoint: dict[str, Any] = {
        "state_dict": {"w": torch.randn(3, 2, generator=generator), "n": torch.zeros((), dtype=torch.int8)},
        "epoch": 3,
        "lists": [[1, 2], 3],
        "half": torch.ones(0, 3, dtype=torch.bfloat16),
    }
    changed = copy.deepcopy(checkpoint)
    assert checksum_of(changed) == checksum_of(checkpoint)
    assert checksum_of({**changed, "checksum": "any"}) == checksum_of(checkpoint)
    change(changed)
    assert checksum_of(changed) != checksum_of(checkpoint)


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop", "lamb", "muon"])
def test_the_checksum_outlives_the_file(name: str, tmp_path: Path) -> None:
    trained(tmp_path / "run", f"--optim.name={name}", "--optim.lr=0.001", "--trainer.early_stop=3", epochs=1)
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["checksum"] == checksum_of(checkpoint)


def test_the_checkpoint_before_is_kept(tmp_path: Path) -> None:
    files = CheckpointFiles(load_recipe("fashion-mnist-allconv-pws"))
    for epoch in range(3):
        files.save_checkpoint({"epoch": epoch}, tmp_path / LAST)
    files.save_checkpoint({"epoch": 7}, tmp_path / "best.ckpt")
    kept = {path.name: torch.load(path, weights_only=True)["epoch"] for path in tmp_path.iterdir()}
    assert kept == {LAST: 2, BEFORE: 1, "best.ckpt": 7}


def test_no_folder_of_temporary_files_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may lie on another file system, from which a rename is a copy over the old file."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    run = trained(tmp_path / "run", epochs=1)
    assert torch.load(run / "checkpoints" / LAST, weights_only=True)["epoch"] == 0


STAND_INS: dict[str, tuple[Damage, str, int]] = {
    "a bit of last": (one_bit, "does not match its checksum", 2),
    "last cut off": (lambda path: path.write_bytes(path.read_bytes()[:3000]), "cut off", 2),
    "last empty": (lambda path: path.write_bytes(b""), "cut off", 2),
    "no last": (lambda path: path.unlink(), "does not exist", 2),
}


@pytest.mark.parametrize(("damage", "words", "epoch"), STAND_INS.values(), ids=STAND_INS)
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(
    damage: Damage, words: str, epoch: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path / "run")
    whole = files(run)
    damage(run / "checkpoints" / "last.ckpt")
    assert main(["train", str(run), "--resume"]) == 0
    printed = capsys.readouterr()
    assert words in printed.err
    assert f"Going on from {run / 'checkpoints' / 'before.ckpt'}, epoch {epoch}." in printed.err
    assert printed.err.count("\n") == 1
    assert f"epoch {epoch + 1}/3" in printed.out
    assert f"epoch {epoch}/3" not in printed.out
    assert (run / "metrics.csv").read_bytes() == whole[run / "metrics.csv"]
    found = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    (run / "checkpoints" / "last.ckpt").write_bytes(whole[run / "checkpoints" / "last.ckpt"])
    wanted = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path / "run")
    for name in (LAST, BEFORE, "best.ckpt"):
        one_bit(run / "checkpoints" / name)
    before = files(run)
    assert main(["train", str(run), "--resume"]) == 2
    assert "last.ckpt does not match its checksum" in capsys.readouterr().err
    assert files(run) == before
