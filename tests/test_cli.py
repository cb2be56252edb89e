"""Bad input through the command line: one clear error each, exit code 2, nothing overwritten."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_data import write_folder, write_npz

from pws.cli import main
from pws.training import load_recipe, train

TRAIN = (
    *("train", "fashion-mnist-allconv-pws", "--data.name=digits", "--data.image_size=12", "--data.train_images=64"),
    *("--data.batch_size=32", "--model.width=0.08", "--trainer.epochs=1", "--trainer.accelerator=cpu"),
)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(load_recipe(*TRAIN[1:]), folder, quiet=True)
    return folder


def fail(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a bad command prints."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("pws: ")
    assert "Traceback" not in printed.err
    assert "training " not in printed.out, "the run must not start"
    return printed.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.method=bnn"], "unknown method 'bnn'; did you mean bn"),
        (["--model.name=resnet51"], "unknown model 'resnet51'; did you mean resnet50"),
        (["--data.name=digit"], "unknown dataset 'digit'; did you mean digits?"),
        (["--optim.leaning_rate=1"], "unknown flag --optim.leaning_rate"),
        (["--optim.lrs=1"], "did you mean --optim.lr"),
        (["--optim.lr=fast"], "optim.lr"),
        (["--optim.lr.max=1"], "no option --optim.lr.max: optim.lr takes one value"),
        (["--name.first=1"], "no option --name.first: name takes one value"),
        (["--optim.schedule=cosin"], "optim.schedule"),
        (["--model.gain=rellu"], "unknown activation 'rellu'; did you mean relu"),
        (["--model.method=bn", "--model.gain=1.0"], "the method bn has no option 'gain'"),
        (["--model.gamma=-1"], "gamma is added to a variance"),
        (["--model.width=0"], "model.width must be positive"),
        (["--model.num_classes=7"], "the data's number of classes; got 7, the data has 10"),
        (["--data.image_size=8"], "can't take images of 8 x 8"),
        (["--data.batch_size=65"], "at most the number of training images, 64; got 65"),
        (["--data.batch_size=32", "--trainer.accumulate=5"], "divisible"),
        (["--data.train_images=5000"], "has 1,437 training images"),
        (["--trainer.precision=17"], "Lightning refuses"),
        (["--optim.lr=-1"], "optim.lr must be at least 0; got -1"),
        (["--optim.lr=.inf"], "optim.lr must be at least 0; got inf"),
        (["--optim.momentum=1"], "optim.momentum must be at least 0 and below 1"),
        (["--optim.step_bound=0"], "optim.step_bound must be positive"),
        (["--optim.clip_norm=1", "--optim.step_bound=0.1"], "both clip the gradient"),
        (["--optim.schedule=step"], "needs optim.milestones"),
        (["--optim.name=adam"], "optim.name"),
        (["--optim.name=adamw", "--optim.nesterov=true"], "optim.nesterov needs optim.name sgd"),
        (["--optim.momentum=0", "--optim.nesterov=true"], "optim.momentum above 0; got sgd and momentum 0"),
        (["--trainer.epochs=0"], "trainer.epochs must be at least 1"),
        (["--data.workers=-1"], "data.workers must be at least 0"),
        (["--model.calibrate=initalpha"], "defined by residual blocks"),
        (["--model.method=bn", "--model.calibrate=all"], "the method bn has none"),
        (["--trainer.strategy=fsdp"], "trainer.strategy must be auto, ddp"),
        (["--name=.."], "name is a folder's name"),
        (["--name=a/b"], "name is a folder's name"),
        (["--resume"], "does not exist"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_flag(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in fail(capsys, *TRAIN, f"--runs={tmp_path}", *flags)
    assert not any(tmp_path.iterdir()), "nothing may be left behind"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("optim: {lrr: 0.1}", "optim.lrr"),
        ("optimizer: {lr: 0.1}", "did you mean"),
        ("optim: {lr: fast}", "optim.lr"),
        ("model: [1, 2", "not a YAML file"),
        ("just words", "must hold a recipe's keys"),
    ],
)
def test_bad_recipe_file(content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    assert message in fail(capsys, "train", str(tmp_path / "mine.yaml"), f"--runs={tmp_path / 'runs'}")
    assert not (tmp_path / "runs").exists()


def test_runs_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert "cannot make the run folder" in fail(capsys, *TRAIN, f"--runs={tmp_path / 'file'}")
    assert (tmp_path / "file").read_text() == "mine"


def test_misspelt_recipe_and_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean fashion-mnist-allconv-pws" in fail(capsys, "train", "fashion-mnist-allconv-pwss")
    assert "did you mean train?" in fail(capsys, "trian")
    assert "the recipe comes first" in fail(capsys, "train", "--optim.lr=1")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar10", "--data.download true"),
        ("imagenet", "train is missing"),
        ("folder", "train is missing"),
        ("npz", "cannot read"),
    ],
)
def test_missing_files(name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = fail(
        capsys, *TRAIN, f"--data.name={name}", f"--data.root={tmp_path / 'none'}", f"--runs={tmp_path / 'runs'}"
    )
    assert message in error
    assert str(tmp_path / "none") in error, "the error says where it looked"
    assert not (tmp_path / "runs").exists()


def test_corrupt_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "data", classes=2, images=2, side=40)
    broken = tmp_path / "data" / "val" / "class0" / "0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    flags = ("--data.name=folder", f"--data.root={tmp_path / 'data'}", "--data.train_images=null")
    assert str(broken) in fail(capsys, *TRAIN, *flags, f"--runs={tmp_path / 'runs'}")


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_training_image(tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "data", classes=2, images=4, side=40)
    broken = tmp_path / "data" / "train" / "class1" / "0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    flags = (
        "--data.name=folder",
        f"--data.root={tmp_path / 'data'}",
        "--data.train_images=null",
        "--data.batch_size=8",
        "--data.validation=0",
    )
    assert main([*TRAIN, *flags, f"--data.workers={workers}", f"--runs={tmp_path / 'runs'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pws: cannot read the image {broken}")
    assert error.count("\n") == 1
    assert not any((tmp_path / "runs").iterdir()), "the folder of a run that never began blocks the next try"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_images": np.zeros((20, 16, 16, 3), np.uint8)}, "must be of one shape"),
        ({"train_labels": np.array(["a"] * 20)}, "cannot read"),
        ({"train_labels": np.zeros(20, int), "test_labels": np.zeros(20, int)}, "at least two classes"),
        ({"train_labels": np.zeros(7, int)}, "as many labels"),
    ],
    ids=["channels", "strings", "one class", "count"],
)
def test_bad_arrays(
    changes: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_npz(tmp_path / "data.npz")
    with np.load(tmp_path / "data.npz") as file:
        np.savez(tmp_path / "data.npz", **{**dict(file), **changes})
    flags = ("--data.name=npz", f"--data.root={tmp_path / 'data.npz'}", "--data.train_images=null")
    assert message in fail(capsys, *TRAIN, *flags, f"--runs={tmp_path / 'runs'}")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("checkpoints/last.ckpt", b"cut off", "is not a checkpoint"),
        ("recipe.yaml", b"", "holds no recipe"),
        ("recipe.yaml", b"model: [", "cannot read"),
        ("summary.json", b"{", "cannot read"),
    ],
)
def test_resume_from_a_damaged_folder(
    file: str, content: bytes, message: str, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "checkpoints" / "best.ckpt").unlink()  # it would stand in for the last one
    (tmp_path / "run" / file).write_bytes(content)
    error = fail(capsys, *TRAIN, f"--runs={tmp_path}", "--name=run", "--resume")
    assert message in error
    assert (tmp_path / "run" / file).read_bytes() == content


def test_resume_in_the_given_folder(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is finished" in fail(capsys, "train", str(run_folder), "--resume")


def test_images_that_hold_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_npz(tmp_path / "nan.npz", count=40)
    with np.load(tmp_path / "nan.npz") as file:
        arrays = dict(file)
    arrays["train_images"] = arrays["train_images"].astype(np.float32)
    arrays["train_images"][7, 3, 3] = np.nan
    np.savez(tmp_path / "nan.npz", **arrays)
    flags = ("--data.name=npz", f"--data.root={tmp_path / 'nan.npz'}", "--data.train_images=null", f"--runs={tmp_path}")
    error = fail(capsys, *TRAIN, *flags)
    assert "1 of 40 train_images" in error
    assert "the first is number 7" in error


def test_run_folder_exists(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    assert "nothing in it is overwritten" in fail(capsys, *TRAIN, f"--runs={run_folder.parent}", "--name=run")
    assert {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()} == before


def test_evaluate_agrees_with_the_run(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run_folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    summary = json.loads((run_folder / "summary.json").read_text())
    assert found["accuracy"] == pytest.approx(summary["metrics"]["accuracy"])
    assert found["loss"] == pytest.approx(summary["metrics"]["loss"], rel=1e-5)
    assert found["accuracy"] <= found["top5"] <= 1
    counts = np.bincount(_digit_test_labels(), minlength=10)
    mean = sum(value * count for value, count in zip(found["per_class"].values(), counts, strict=True)) / counts.sum()
    assert mean == pytest.approx(found["accuracy"], abs=1e-6)
    assert main(["evaluate", str(run_folder), "--checkpoint=last"]) == 0
    assert "top-1" in capsys.readouterr().out


def _digit_test_labels() -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    from sklearn.datasets import load_digits

    return load_digits().target[::5]


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [("nowhere.ckpt", "does not exist"), ("garbage.ckpt", "not a checkpoint"), ("other.ckpt", "another architecture")],
)
def test_bad_checkpoint(run_folder: Path, checkpoint: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (run_folder / "garbage.ckpt").write_bytes(b"not a zip")
    weights = torch.load(run_folder / "checkpoints" / "best.ckpt", weights_only=True)
    weights["state_dict"]["model.head.weight"] = torch.zeros(3, 3)
    torch.save(weights, run_folder / "other.ckpt")
    assert message in fail(capsys, "evaluate", str(run_folder), f"--checkpoint={run_folder / checkpoint}")


def test_evaluate_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no run folder" in fail(capsys, "evaluate", str(tmp_path))


def test_exit_codes_of_the_process(tmp_path: Path) -> None:
    def pws(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "pws", *arguments], capture_output=True, text=True, cwd=tmp_path)

    top = pws()
    assert top.returncode == 0
    assert all(command in top.stdout for command in ("demo", "train", "evaluate"))
    bad = pws("trian", "nope")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.count("\n") == 1


def test_help_of_train_shows_an_example_and_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Example: pws train fashion-mnist-allconv-pws" in shown
    assert "--optim.clip_norm" in shown


@pytest.mark.parametrize("command", ["evaluate", "demo"])
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"Example: pws {command}" in capsys.readouterr().out


def test_diverging_run_exits_with_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--model.method=none", "--optim.lr=1e6", "--optim.step_bound=null", "--trainer.epochs=3")
    assert main([*TRAIN, *flags, f"--runs={tmp_path}", "--name=bad"]) == 3
    error = capsys.readouterr().err
    assert "non-finite at step" in error
    assert "features." in error
    assert error.count("\n") == 1
